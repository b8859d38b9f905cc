"""A user study as one page: blind pairs to choose from, and the counting of what was chosen."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from diffusionact.errors import MediaError, SettingsError
from diffusionact.evaluation.page import page
from diffusionact.files import write_whole
from diffusionact.image import resize_area

SIDE_PX = 256
CONFIDENCE_Z = 1.959964  # 97.5 % quantile of the normal distribution
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMAT = "diffusionact-study-1"


@dataclass(frozen=True)
class Question:
    """Which of two results is better: `left` and `right` are methods, unknown to the reader."""

    name: str
    left: str
    right: str


@dataclass(frozen=True)
class Share:
    """chosen: of `shown` times; low, high: ends of the 95 % interval of the share."""

    method: str
    chosen: int
    shown: int
    low: float
    high: float


def questions(
    names: Sequence[str], methods: Sequence[str], count: int, seed: int
) -> list[Question]:
    """Return what is asked: each question one picture and two methods, the first listed always
    one of them, sides and order at random with a fixed seed. None is asked twice, so that there may
    be fewer than `count`.

    Raises: SettingsError for fewer than two methods or no picture that all have.
    """
    if len(methods) < 2 or not names or count < 1:
        raise SettingsError(
            f"{len(methods)} methods, {len(names)} pictures that all of them have, {count} "
            "questions; wanted NAME=DIR twice or more, with pictures of the same names"
        )
    rng = np.random.default_rng(seed)
    order = [names[int(i)] for i in rng.permutation(len(names))]
    others = methods[1:]
    asked = []
    for turn in range(len(others)):  # every picture once before any comes again
        for i, name in enumerate(order):
            pair = [methods[0], others[(i + turn) % len(others)]]
            if rng.random() < 0.5:
                pair.reverse()
            asked.append(Question(name, *pair))
    return asked[:count]


def write_study(
    path: Path,
    methods: Mapping[str, Path],
    asked: Sequence[Question],
    shown: Sequence[Path | None] = (),
) -> None:
    """Return nothing; the page is written with all its pictures.

    methods: name -> folder of results; shown: folders of what stands above each pair, such as the
    source and the target. What is left and what right stands in the page only as a key that its
    reader does not see; the choices that are saved carry it.
    Raises: MediaError for a picture that cannot be read.
    """
    items = []
    for question in asked:
        above = [_data(folder, question.name) for folder in shown if folder is not None]
        sides = [_data(methods[side], question.name) for side in (question.left, question.right)]
        items.append({"above": above, "sides": sides})
    key = base64.b64encode(json.dumps([asdict(q) for q in asked]).encode()).decode()
    script = f"const items = {json.dumps(items)};\nconst key = {json.dumps(key)};\n{SCRIPT}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page("Which is better?", BODY, script))


def count(files: Sequence[Path]) -> list[Share]:
    """Return how often each method was chosen over all saved choices, the most chosen first.

    The interval is Wilson's, of a share of independent choices; choices of one person are not, so
    that it is narrower than the truth for few people. Source: Wilson 1927.
    Raises: MediaError for a file that is none of saved choices.
    """
    chosen: dict[str, int] = {}
    shown: dict[str, int] = {}
    for file in files:
        for question, choice in _choices(file):
            for side in (question.left, question.right):
                shown[side] = shown.get(side, 0) + 1
            picked = question.left if choice == 0 else question.right
            chosen[picked] = chosen.get(picked, 0) + 1
    shares = [
        Share(method, chosen.get(method, 0), n, *wilson(chosen.get(method, 0), n))
        for method, n in shown.items()
    ]
    return sorted(shares, key=lambda share: -share.chosen / share.shown)


def wilson(chosen: int, shown: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a share. Source: Wilson 1927, Eq. 4."""
    if shown == 0:
        return 0.0, 1.0
    z2 = CONFIDENCE_Z**2
    p = chosen / shown
    middle = (p + z2 / (2 * shown)) / (1 + z2 / shown)
    half = CONFIDENCE_Z * math.sqrt(p * (1 - p) / shown + z2 / (4 * shown**2)) / (1 + z2 / shown)
    return max(0.0, middle - half), min(1.0, middle + half)


def common_names(folders: Sequence[Path]) -> list[str]:
    """Return the names, without ending, of the pictures that all folders have, sorted."""
    found = [
        {path.stem for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
        for folder in folders
        if _is_folder(folder)
    ]
    return sorted(set.intersection(*found)) if found else []


def _is_folder(folder: Path) -> bool:
    if not folder.is_dir():
        raise MediaError(f"{folder}: no such folder; wanted one of pictures")
    return True


def _choices(file: Path) -> list[tuple[Question, int]]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}")
        asked = [Question(**each) for each in json.loads(base64.b64decode(values["key"]))]
        chosen = values["choices"]
        if len(chosen) != len(asked) or any(choice not in (0, 1, None) for choice in chosen):
            raise ValueError(f"{len(chosen)} choices for {len(asked)} questions")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MediaError(f"{file}: not the choices of a study ({error})") from error
    return [(q, choice) for q, choice in zip(asked, chosen, strict=True) if choice is not None]


def _data(folder: Path, name: str) -> str:
    path = next(
        (folder / f"{name}{end}" for end in SUFFIXES if (folder / f"{name}{end}").exists()), None
    )
    image = None if path is None else cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise MediaError(f"{folder}: no picture named {name} that can be read")
    picture = np.asarray(image, np.uint8)
    width = round(SIDE_PX * picture.shape[1] / picture.shape[0])
    sized = resize_area(picture, width, SIDE_PX)
    _, encoded = cv2.imencode(".webp", sized, [cv2.IMWRITE_WEBP_QUALITY, 92])
    return "data:image/webp;base64," + base64.b64encode(encoded.tobytes()).decode()


BODY = """
<h1>Which is better?</h1>
<p class='lead'>Choose the picture that shows the person on the left above, moving as the one on
the right above. There is no right answer; take the one you would rather have. Keys: 1, 2, and
left for the one before. Nothing leaves this page until you save the file and send it.</p>
<p id='place' aria-live='polite'></p>
<div class='figures' id='above'></div>
<div class='figures' style='margin:1rem 0'>
<button data-side='0'><img alt='first result' id='a'><br>1</button>
<button data-side='1'><img alt='second result' id='b'><br>2</button></div>
<p><button id='back'>Back</button> <button id='save'>Save choices</button></p>
"""

SCRIPT = """
const store = 'study-' + key.slice(0, 24) + items.length;
let choices = JSON.parse(localStorage.getItem(store) || 'null') || items.map(() => null);
let at = Math.max(0, choices.indexOf(null) === -1 ? items.length - 1 : choices.indexOf(null));
const find = id => document.getElementById(id);
function show() {
  const item = items[at], left = choices.filter(c => c === null).length;
  find('place').textContent = `Pair ${at + 1} of ${items.length}` +
    (left ? `, ${left} to go` : ': done, please save');
  find('above').replaceChildren(...item.above.map(source => {
    const image = new Image(); image.src = source; image.alt = ''; return image; }));
  find('a').src = item.sides[0]; find('b').src = item.sides[1];
  document.querySelectorAll('[data-side]').forEach(button =>
    button.classList.toggle('chosen', choices[at] === Number(button.dataset.side)));
}
function choose(side) {
  choices[at] = side;
  try { localStorage.setItem(store, JSON.stringify(choices)); } catch (error) { /* private tab */ }
  if (at < items.length - 1) at += 1;
  show();
}
document.querySelectorAll('[data-side]').forEach(button =>
  button.addEventListener('click', () => choose(Number(button.dataset.side))));
find('back').addEventListener('click', () => { at = Math.max(0, at - 1); show(); });
find('save').addEventListener('click', () => {
  const text = JSON.stringify({format: 'diffusionact-study-1', key, choices});
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  link.download = 'choices.json'; link.click(); URL.revokeObjectURL(link.href);
});
document.addEventListener('keydown', event => {
  if (event.key === '1' || event.key === '2') choose(Number(event.key) - 1);
  if (event.key === 'ArrowLeft') { at = Math.max(0, at - 1); show(); }
});
show();
"""
