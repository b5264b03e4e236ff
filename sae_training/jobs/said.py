"""What a job says, read along while it says it."""

from __future__ import annotations

import codecs
import io
import os
from pathlib import Path
from typing import TextIO

from sae_training.machine.log import PLACE_FILE
from sae_training.machine.run_files import LOG_FILE, read_if_sound


class Said:
    """The log in a job's folder, or in its ticket and then in its folder. One that is deleted is read to its end."""

    def __init__(self, folder: Path, out: TextIO) -> None:
        self.folder, self.out = folder, out
        self.file: io.FileIO | None = None
        self.has_moved = False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self) -> None:
        """Write what has been said since the last time."""
        if self.file is None and (self.folder / LOG_FILE).exists():
            self.file = io.FileIO(self.folder / LOG_FILE)
        self.pass_on()
        place = read_if_sound(self.folder / PLACE_FILE)
        if place and not self.has_moved:
            self.has_moved = True
            file = Path(place["folder"]) / LOG_FILE
            if file.exists() and (self.file is None or not os.path.samestat(os.fstat(self.file.fileno()), file.stat())):
                read = 0 if self.file is None else self.file.tell()
                self.file = io.FileIO(file)
                self.file.seek(place["log_begins"] + read)
                self.pass_on()

    def pass_on(self) -> None:
        if self.file is not None and (said := self.file.readall()):
            self.out.write(self.decoder.decode(said))
            self.out.flush()
