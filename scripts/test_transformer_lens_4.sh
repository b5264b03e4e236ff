#!/usr/bin/env bash
# Runs the tests that touch the language model with transformer-lens 4. It is installed without dependencies in a folder
# that comes before the locked 3.x on the path, because an environment holds only one version.
set -euo pipefail
cd "$(dirname "$0")/.."

version=4.3.0
python=${PYTHON:-$PWD/.venv/bin/python}
overlay=$PWD/.venv/transformer-lens-$version

if [ ! -d "$overlay" ]; then
    rm -rf "$overlay.tmp" # an installation that was interrupted
    "$python" -m pip install --quiet --no-deps --target "$overlay.tmp" "transformer-lens==$version"
    mv "$overlay.tmp" "$overlay"
fi
export PYTHONPATH="$overlay:$PWD"
[ "$("$python" -c 'from importlib.metadata import version; print(version("transformer-lens"))')" = "$version" ]

"$python" -m pytest --numprocesses logical --maxprocesses 4 -m "not slow" "$@" \
    tests/unit/language_model tests/unit/activations_store/test_activations_store.py tests/unit/run/test_evals.py \
    tests/integration/test_run.py::test_run_leaves_everything_the_readme_names \
    tests/integration/test_run.py::test_evaluate_run_repeats_the_final_evaluation \
    "tests/integration/test_resume.py::test_every_kind_of_run_resumes_exactly[topk]" \
    "tests/integration/test_resume.py::test_every_kind_of_run_resumes_exactly[transcoder]" \
    "tests/integration/test_resume.py::test_signal_saves_and_says_how_to_go_on[15-143]"
