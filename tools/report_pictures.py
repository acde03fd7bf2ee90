"""Takes pictures of a report with a headless Chromium: light and dark, narrow and wide; or those of the README.

    python tools/report_pictures.py out                      out-pictures/: 400 and 1600 pixels wide, light and dark
    python tools/report_pictures.py out --readme             docs/pictures/report.png and grid.png

The README shows `qdexport compile shapes --recipe w8a8-timestep --out out`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import click
from PIL import Image

ROOT: Final = Path(__file__).resolve().parents[1]
_NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SIZES: Final = {400: 9000, 1600: 6500}
_README_SIZE: Final = (1200, 1500)
_SECONDS: Final = 120


def browser() -> str:
    """The path of a browser. Ends the program where there is none."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise click.ClickException("no Chromium is installed (Debian: apt-get install chromium)")
    return found


def shoot(page: Path, picture: Path, size: tuple[int, int], *, dark: bool) -> None:
    """Writes one picture of a page as a PNG file."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}", f"--screenshot={picture.resolve()}",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []), page.resolve().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode != 0 or not picture.is_file():
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise click.ClickException(f"{command[0]} took no picture; it said: {said[-1]}")


@click.command(epilog=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--readme", is_flag=True, help="Replace docs/pictures/report.png and grid.png.")
def main(out: Path, readme: bool) -> None:
    """Take pictures of OUT/report.html."""
    page = out / "report.html"
    if not page.is_file():
        raise click.ClickException(f"{page} does not exist; run `qdexport validate {out}` first")
    if readme:
        pictures = ROOT / "docs" / "pictures"
        shot = pictures / "report.png"
        shoot(page, shot, _README_SIZE, dark=False)
        with Image.open(shot) as opened:
            few = opened.convert("P", palette=Image.Palette.ADAPTIVE)  # a third of the bytes
        few.save(shot, optimize=True)
        shutil.copyfile(out / "images" / "grid.png", pictures / "grid.png")
        click.echo(f"{pictures}/report.png and grid.png", err=True)
        return
    folder = out.with_name(f"{out.resolve().name}-pictures")
    folder.mkdir(exist_ok=True)
    for width, height in _SIZES.items():
        for dark in (False, True):
            path = folder / f"report-{width}-{'dark' if dark else 'light'}.png"
            shoot(page, path, (width, height), dark=dark)
            click.echo(str(path), err=True)


if __name__ == "__main__":
    sys.exit(main())
