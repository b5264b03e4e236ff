"""Print the table of docs/formats.md: how far encode and decode are from the program that wrote each reference file.

PYTHONPATH=.:tests python scripts/reference_files/table.py
"""

from __future__ import annotations

import warnings
from contextlib import suppress

import reference  # pyright: ignore[reportMissingImports] - tests/reference.py


def main() -> None:
    warnings.simplefilter("ignore")  # the remarks on single files
    print("| family | variant | read as | encode | decode | expected values from |")
    print("|---|---|---|---|---|---|")
    for folder in reference.FOLDERS:
        facts, sae, off = reference.facts_of(folder), reference.loaded(folder), reference.difference(folder)
        family = folder.name.partition("-")[0]
        by = facts["package"] if facts["by"] == family.replace("saelens", "sae-lens") else facts["by"]
        shown = f"{off.acts:.1e} | {off.out:.1e}"
        print(f"| {family} | {facts['variant']} ({folder.name}) | {sae.architecture} | {shown} | {by} |")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
