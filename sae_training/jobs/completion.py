"""Completion for shells: verbs and flags as tyro completes them, and the names of runs for the verbs that take one."""

from __future__ import annotations

import shlex
import sys
from typing import Literal

from sae_training.jobs import names

TAKE_A_RUN = "attach|logs|stop|resume|rm|sync|reproduce"

IN_BASH = r"""
_sae_training() {
  local line=${COMP_LINE:0:COMP_POINT} run_dir=runs before=${COMP_WORDS[COMP_CWORD - 1]} i name quoted
  local cur=${line##*[[:space:]]}
  for ((i = 1; i < COMP_CWORD; i++)); do
    case ${COMP_WORDS[i]} in --run[-_]dir) run_dir=${COMP_WORDS[i + 1]} ;; esac
  done
  case ${COMP_WORDS[1]} in
    VERBS)
      if [[ $cur != -* && $COMP_CWORD -gt 1 && $before != --run[-_]dir ]]; then
        COMPREPLY=()
        while IFS= read -r name; do
          printf -v quoted %q "$name"
          [[ $quoted == "$cur"* ]] && COMPREPLY+=("$quoted")
        done < <(NAMES "$run_dir" 2>/dev/null)
        __tyro_tyro_sae_training_ltrim_colon_completions "$cur"
        return
      fi ;;
  esac
  _tyro_sae_training "$@"
}
complete -o bashdefault -F _sae_training sae-training
"""
IN_ZSH = r"""
_sae-training() {
  local run_dir=runs i
  for ((i = 2; i < CURRENT; i++)); do
    case $words[i] in (--run[-_]dir) run_dir=$words[i+1] ;; esac
  done
  case $words[2] in
    (VERBS)
      if [[ $words[CURRENT] != -* && $CURRENT -gt 2 && $words[CURRENT-1] != --run[-_]dir ]]; then
        compadd -- ${(f)"$(NAMES "$run_dir" 2>/dev/null)"}
        return
      fi ;;
  esac
  _tyro_sae_training "$@"
}
if [ "$funcstack[1]" = "_sae-training" ]; then _sae-training "$@"; else compdef _sae-training sae-training; fi
"""


def script(shell: Literal["bash", "zsh"], of_tyro: str) -> str:
    """Return what the shell is to read; `of_tyro`: what tyro prints for it."""
    if shell == "zsh":
        of_tyro = of_tyro.rstrip().removesuffix('_tyro_sae_training "$@"')
    ours = IN_BASH if shell == "bash" else IN_ZSH
    lists_names = shlex.join([sys.executable, "-m", names.__name__])
    return of_tyro + ours.replace("VERBS", TAKE_A_RUN).replace("NAMES", lists_names)
