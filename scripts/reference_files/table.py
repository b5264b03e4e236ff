"""Print the tables of docs/formats.md: how far encode and decode are from the program that wrote each reference file.

PYTHONPATH=.:tests python scripts/reference_files/table.py
"""

from __future__ import annotations

import warnings
from contextlib import suppress

import reference  # pyright: ignore[reportMissingImports] - tests/reference.py


def main() -> None:
    warnings.simplefilter("ignore")  # the remarks on single files
    for folders in (reference.FOLDERS, reference.CROSSCODERS):
        print("| family | variant | read as | encode | decode | expected values from |")
        print("|---|---|---|---|---|---|")
        for folder in folders:
            facts, sae, off = reference.facts_of(folder), reference.loaded(folder), reference.difference(folder)
            family = folder.name.partition("-")[0]
            by = facts["package"] if facts["by"] == family.replace("saelens", "sae-lens") else facts["by"]
            if getattr(sae.cfg, "file_format", None) == "dictionary_learning AutoEncoder":
                by += ", normalize_decoder=False"
            shown = f"{off.acts:.1e} | {off.out:.1e}"
            read_as = getattr(sae, "architecture", None) or f"{sets(len(sae.cfg.latents))}, {sae.cfg.activation}"
            print(f"| {family} | {facts['variant']} ({folder.name}) | {read_as} | {shown} | {by} |")
        print()


def sets(n: int) -> str:
    return "1 set" if n == 1 else f"{n} sets"


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
