# The body of every SLURM job script of ows_ds: starts `command` on all nodes of the job, passes signals on, and has the
# job requeued where it was stopped and saved. The script before it sets:
#
#   command   what stands after `ows-ds`, as an array; training needs --train.resume auto to resume
#   launcher  srun: a task for each process; torchrun, accelerate: a task for each node, which starts its processes
#   setup     a function: what each node needs, such as modules and the Python environment
#   inside    what stands before the command, such as a container's, as an array; may be empty
#   retries   how often a job that failed (and was not just stopped) is tried again
#   port      where processes meet on the first node; may be left out
#   accelerate_config   for launcher=accelerate: its file; may be left out
#
# and asks for --ntasks-per-node: the processes of a node.
#
# shellcheck shell=bash disable=SC2154,SC2317,SC2016
set -uo pipefail

accelerate_config=${accelerate_config:-launch/accelerate/zero3_nodes.yaml}
processes=${SLURM_NTASKS_PER_NODE:?ask for --ntasks-per-node, the processes of a node}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${port:-$((10000 + SLURM_JOB_ID % 20000))} # below those that Linux hands out
export MASTER_ADDR MASTER_PORT

# SLURM tells this shell of a time limit or a preemption to come; the processes are to know.
signalled=''
trap 'signalled=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 TERM

# A launcher that started processes must outlive the signals that are for these, and it makes another exit code of
# theirs: 75, stopped and saved, is said here by who got the signal.
under_launcher() {
    local signalled='' code
    trap 'signalled=yes' USR1 TERM
    (trap '' USR1 TERM && exec "${inside[@]}" "$@") &
    while kill -0 $! 2>/dev/null; do wait $!; done
    wait $!
    code=$?
    if [[ $signalled && $code != [02] ]]; then code=75; fi
    exit "$code"
}

# What each task does: $1 is the launcher.
task() {
    setup || exit 1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > processes ? SLURM_CPUS_ON_NODE / processes : 1))}
    export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT # torchrun leaves SIGTERM to the processes
    local meeting
    case $launcher in
    srun) exec "${inside[@]}" python -m ows_ds "$@" ;;
    torchrun)
        meeting=(--node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
        under_launcher torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$processes" "${meeting[@]}" -m ows_ds "$@"
        ;;
    accelerate)
        meeting=(--machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
        under_launcher accelerate launch --config_file "$accelerate_config" --num_machines "$SLURM_NNODES" \
            --num_processes $((SLURM_NNODES * processes)) "${meeting[@]}" -m ows_ds "$@"
        ;;
    *) echo "launcher: '$launcher' is invalid: expected srun, torchrun or accelerate" >&2 && exit 2 ;;
    esac
}

tasks=1
if [[ $launcher == srun ]]; then tasks=$processes; fi
# the functions and arrays above, for the tasks' shells
state=$(
    declare -p launcher inside processes command accelerate_config
    declare -f setup task under_launcher
)
srun --kill-on-bad-exit=1 --nodes="$SLURM_NNODES" --ntasks=$((SLURM_NNODES * tasks)) --ntasks-per-node="$tasks" \
    --cpus-per-task=$((SLURM_CPUS_ON_NODE > tasks ? SLURM_CPUS_ON_NODE / tasks : 1)) \
    bash -c "$state"$'\n''task "${command[@]}"' &
while kill -0 $! 2>/dev/null; do wait $!; done # a signal ends a wait early
wait $!
code=$?

again=no
case $code in
0 | 2) ;; # done; a mistake that another attempt does not mend
75) again=yes ;; # stopped and saved
*) # signalled while it started: it had nothing to save
    if [[ $signalled ]] || ((${SLURM_RESTART_COUNT:-0} < ${retries:-0})); then again=yes; fi ;;
esac
state=$(scontrol show job "$SLURM_JOB_ID")
# not one that is being cancelled, which is COMPLETING by now
if [[ $again == yes && $state == *JobState=RUNNING* ]]; then
    echo "exit code $code after start $((${SLURM_RESTART_COUNT:-0} + 1)): the job is requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
