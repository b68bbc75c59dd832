"""`ows-ds completion`."""

import importlib

from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, sentence
from ows_ds.errors import UserError

SHELLS = ("bash", "zsh")
BASH = """_ows_ds() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} verb=${{COMP_WORDS[1]}} words
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
        return
    fi
    case $verb in
{cases}
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _ows_ds ows-ds
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def parser() -> Parser:
    """The options."""
    text = "For example: `ows-ds completion bash > ~/.local/share/bash-completion/completions/ows-ds`."
    made = Parser("completion SHELL", f"{sentence(VERBS['completion'])} {text}")
    made.add_argument("shell", metavar="SHELL", nargs="?", help=" or ".join(SHELLS))
    return made


def run(options: Options, argv: list[str]) -> None:
    """Print it."""
    shell = options.get("shell")
    if shell not in SHELLS:
        raise UserError("SHELL", shell, f"expected one of {', '.join(SHELLS)}")
    cases = [f'        {verb}) words="{" ".join(options_of(verb))}" ;;' for verb in VERBS]
    print((ZSH if shell == "zsh" else "") + BASH.format(verbs=" ".join(VERBS), cases="\n".join(cases)), end="")


def options_of(verb: str) -> list[str]:
    """A verb's options, as they are typed."""
    made: Parser = importlib.import_module(f"ows_ds.cli.{verb}").parser()
    return sorted(f"--{name}" for name in {*made.names, "help"})
