"""Completion scripts: commands, then a command's options, else files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_fedpara() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands} --help --version"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
        [ "${{word#-}}" = "$word" ] && [ "${{COMP_WORDS[1]}}" != completion ] && words=""
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _fedpara fedpara
"""
_CASE = "            {name}) words={words!r} ;;"
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def completion(shell: str, words: Mapping[str, Sequence[str]]) -> str:
    """A script to be read by a shell.

    Args:
        shell: one of ``SHELLS``.
        words: what may follow each command.
    """
    if shell == "fish":
        return _fish(words)
    cases = "\n".join(_CASE.format(name=n, words=" ".join(w)) for n, w in words.items())
    script = _BASH.format(commands=" ".join(words), cases=cases)
    return _ZSH + script if shell == "zsh" else script


def _fish(words: Mapping[str, Sequence[str]]) -> str:
    lines = [f"complete -c fedpara -n __fish_use_subcommand -f -a '{' '.join(words)}'"]
    for name, follow in words.items():
        seen = f"complete -c fedpara -n '__fish_seen_subcommand_from {name}'"
        plain = [word for word in follow if not word.startswith("-")]
        lines += [f"{seen} -l {word[2:]}" for word in follow if word.startswith("--")]
        lines += [f"{seen} -f -a '{' '.join(plain)}'"] if plain else []
    return "\n".join(lines) + "\n"
