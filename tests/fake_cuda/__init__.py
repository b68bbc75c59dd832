"""CUDA devices for a machine without a GPU, so that its tests find what would break, hang, race or wait on one.

    python -m tests.fake_cuda run --devices 2 --waits waits.txt --races races.txt python -m ows_ds train ...

Under it torch sees GPUs. Their memory is the host's, their operators are the CPU's, numbers are real. As on a GPU:

* tensors of two devices in one operator raise, and so does a generator of the CPU for a tensor of a GPU;
* the backward pass runs in autograd's own threads;
* streams and events order kernels, nothing else does: accesses of two streams that nothing orders are races, and so is
  memory that is freed while another stream uses it (`races`);
* what lets the host wait for the device is counted by place (`host_waits`);
* the backend nccl refuses tensors of the CPU, and its collectives are done as late as they may be (`collectives`).

Not as on a GPU: kernels, and with them rounding, speed and errors of CUDA's own (flash attention, cuSOLVER); NCCL's
timeouts and aborts. Nothing runs out of memory. Copies to pinned memory are complete at once. A wait of one thread
counts as one of all.

torch's CPU build lacks hooks, a device guard and kernels for CUDA. ``device.cpp`` registers them, before torch is
imported: ``site/sitecustomize.py`` sees to that in every Python process of the environment (`environment.environment`).
"""
