"""The true command on a few embedded scenes, and its page as parsers and a browser see it."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import zoo
from zoo import weights
from zoo.commands import compare as command
from zoo.commands.compare import main

LIMIT = 16
NAMES = ["dualtoken-tiny", "aurora-tiny", "broken", "aurora-depth"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
VOID = ("meta", "link", "img", "source", "input", "br")


@dataclass(frozen=True)
class BrokenConfig:
    image_size: int = 64


class Broken(zoo.Tokenizer):
    """Fails at its first image."""

    Config = BrokenConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.info = zoo.TokenizerInfo(
            "broken", "none", 64, None, 3, "discrete", ("image",), 1, codebook_sizes={"image": 2}
        )

    def _encode(self, images):
        raise RuntimeError("the codebook <fell> off\nand more")


zoo.register_tokenizer("broken", zoo.Preset(Broken, BrokenConfig(), "for tests"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "broken.safetensors"
    weights.save(path, Broken(BrokenConfig()).state_dict())
    return f"weights.broken={path}"


def arguments(folder, *overrides, names=NAMES):
    return [
        *(f"tokenizers=[{','.join(names)}]", f"output_dir={folder}", f"limit={LIMIT}", "pictures=2", "rates=[1]"),
        *("encode.dualtoken-tiny={levels: [1, 4]}", "device=cpu", "data.num_workers=0", *overrides),
    ]


@pytest.fixture(scope="module")
def output(tmp_path_factory, broken):
    """A folder of a run that was interrupted at its second tokenizer and begun again; when the first was measured."""
    folder, measure = tmp_path_factory.mktemp("compare"), command.measure

    def interrupted(cfg, fabric, name, path):
        if name == "aurora-tiny":
            raise KeyboardInterrupt
        return measure(cfg, fabric, name, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        patch.setattr(command, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(arguments(folder, broken))
        assert not (folder / "compare.json").exists()
        done = {path: path.stat().st_mtime_ns for path in (folder / "dualtoken-tiny").glob("*.json")}
        assert len(done) == 4  # three tasks and what they were begun with
        patch.setattr(command, "measure", measure)
        assert main(arguments(folder, broken)) == 0
    return folder, done


@pytest.fixture(scope="module")
def report(output):
    return json.loads((output[0] / "compare.json").read_text())


def test_a_run_goes_on_where_it_was_interrupted(output, report):
    done = output[1]
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert [one["name"] for one in report["tokenizers"]] == NAMES
    assert [len(one["measured"]) for one in report["tokenizers"]] == [3, 1, 0, 0]


def test_everything_is_measured(report):
    dual, aurora = report["tokenizers"][:2]
    assert [point["settings"] for point in dual["points"]] == [{"levels": 1}, {"levels": 4}]
    for point, count in zip(dual["points"], (2, 8), strict=True):
        metrics = point["metrics"]
        assert metrics["bits"] == 64 * 9 * count
        assert metrics["bits_per_pixel"] == pytest.approx(64 * 9 * count / 64**2)
        for name in ("psnr", "ssim", "mae", "fd[aurora-tiny]", "codebook_use/pixel", "perplexity/semantic"):
            assert metrics[name] > 0, name
        for name in ("encode_per_second", "decode_per_second", "peak_process_memory"):
            assert metrics[name] > 0, name
        assert "alexnet" in point["missing"]["lpips"]
    assert dual["points"][0]["metrics"]["psnr"] < dual["points"][1]["metrics"]["psnr"]
    assert 0 < dual["probe"]["metrics"]["colour of the largest"] <= 1
    assert 0 < dual["zeroshot"]["metrics"]["image_to_text_recall@1"] <= 1
    assert report["baselines"]["zeroshot"]["chance"]["image_to_text_recall@1"] == 1 / LIMIT
    assert report["baselines"]["probe"].keys() == {"thumbnail", "most frequent"}
    assert aurora["points"][0]["metrics"]["abs_rel"] > 0
    assert aurora["lacks"].keys() == {"probe", "zeroshot"}
    assert report["protocol"]["limit"] == dual["images"] == LIMIT
    assert report["curves"].keys() == {"image 64 x 64", "depth 64 x 64"}


def test_reconstruction_is_what_evaluate_measures(report, tmp_path):
    from zoo.commands.evaluate import main as evaluate

    same = ["tokenizer=aurora-tiny", f"limit={LIMIT}", "device=cpu", "data.num_workers=0", "baseline=false"]
    assert evaluate([*same, f"output_dir={tmp_path}"]) == 0
    row = json.loads((tmp_path / "metrics.json").read_text())["rows"][0]["metrics"]
    point = report["tokenizers"][1]["points"][0]["metrics"]
    timed = {name for name in row if name.endswith("per_second") or name.startswith("peak")}
    assert {name: point[name] for name in row.keys() - timed} == pytest.approx({n: row[n] for n in row.keys() - timed})


def test_codecs_have_at_most_as_many_bits(report):
    seen = 0
    for one in report["tokenizers"][:2]:
        for point in one["points"]:
            assert point["codecs"].keys() == {"thumbnail", "jpeg", "webp"}
            for codec in point["codecs"].values():
                if "lacks" in codec:
                    assert "the least is" in codec["lacks"]
                    continue
                seen += 1
                assert codec["metrics"]["bits"] <= point["metrics"]["bits"]
                assert codec["metrics"]["psnr"] > 10
    assert seen >= 6
    low, high = (point["codecs"] for point in report["tokenizers"][0]["points"])
    assert "lacks" in low["jpeg"]
    assert low["webp"]["metrics"]["psnr"] < high["webp"]["metrics"]["psnr"]


def test_a_failure_is_a_row_that_says_why(output, report, capfd):
    folder, _ = output
    broken, without = report["tokenizers"][2:]
    assert broken["failed"] == {"reconstruction": "RuntimeError: the codebook <fell> off"}
    assert broken["lacks"].keys() == {"probe", "zeroshot"}
    assert "and more" in (folder / "broken/error.txt").read_text()
    assert "in _encode" in (folder / "broken/error.txt").read_text()
    assert "cannot be downloaded by a program" in without["failed"]["loading"]
    assert "| broken | failed: RuntimeError: the codebook <fell> off |" in (folder / "compare.md").read_text()


class Page(HTMLParser):
    """Checks that tags are closed, and collects addresses and the rows of tables by the heading above."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tables, self.title, self.text = [], [], {}, "", ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ("src", "href", "srcset") if name in attributes]
        if tag in VOID:
            return
        self.open.append(tag)
        self.text = ""
        if tag == "tr":
            self.row = []
        if tag in ("td", "th"):
            self.value = attributes.get("data-value")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("h2", "h3"):
            self.title = self.text if tag == "h2" else f"{self.title.split(': ')[0]}: {self.text}"
        if tag in ("td", "th"):
            self.row.append((self.text.strip(), self.value))
        if tag == "tr":
            self.tables.setdefault(self.title, []).append(self.row)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(output):
    return Page((output[0] / "compare.html").read_text())


def test_the_page_needs_no_other_file(page):
    assert len([one for one in page.addresses if one.startswith("data:image/png;base64,")]) > 20
    assert all(one.startswith(("data:", "#")) for one in page.addresses)


def test_page_markdown_and_json_have_the_same_numbers(output, report, page):
    text, measures = (output[0] / "compare.md").read_text(), report["measures"]["reconstruction"]
    titles = {one["title"]: name for name, one in measures.items()} | {"bits per pixel": "bits_per_pixel"}
    checked = 0
    for section, one in (("Images", report["tokenizers"][0]), ("Depth maps", report["tokenizers"][1])):
        header, *rows = page.tables[f"{section}: Reconstruction"]
        for point, row in zip(one["points"], rows, strict=False):
            for (title, _), (shown, value) in zip(header, row, strict=True):
                name = titles.get(re.sub(" [↑↓]$", "", title))
                if name:
                    assert float(value) == point["metrics"][name], title
                    assert re.search(rf"\| \**{re.escape(shown)}\** \|", text), title
                    checked += 1
    assert checked > 15
    _, row = page.tables["Images: Understanding: linear probe"][:2]
    assert [float(value) for _, value in row[1:]] == list(report["tokenizers"][0]["probe"]["metrics"].values())
    _, _, row, _ = page.tables["Images: At equal bits"]
    point = report["tokenizers"][0]["points"][0]
    psnr = [point["metrics"]["psnr"], *(point["codecs"][c]["metrics"]["psnr"] for c in ("thumbnail", "webp"))]
    assert [float(row[i][1]) for i in (2, 3, 5)] == psnr
    assert row[4] == ("–", None)
    why = report["tokenizers"][3]["failed"]["loading"]
    assert page.tables["Images: Reconstruction"][-1][1][0] == f"failed: {why}"


PROBE = """<script>window.errors = []; window.addEventListener("error", event => errors.push(event.message));
window.addEventListener("securitypolicyviolation", event => errors.push(event.blockedURI));</script>"""
DRIVE = """<script>
const seen = {}, table = document.querySelector("#image table.sortable");
const column = [...table.querySelectorAll("thead th")].findIndex(th => th.textContent.startsWith("PSNR"));
const order = () => [...table.tBodies[0].rows].map(row => row.cells[column]?.dataset.value ?? row.className);
const button = table.querySelectorAll("thead th")[column].querySelector("button");
button.click(); seen.falling = order(); button.click(); seen.rising = order();
const pictures = document.querySelector("#image .pictures"), shown = view => [...pictures.querySelectorAll(
  `.images [data-view="${view}"]`)].filter(one => one.getClientRects().length).length;
seen.pictures = shown("picture");
document.querySelector('#image .views [data-view="tokens"]').click();
seen.tokens = shown("tokens"); seen.left = shown("picture");
document.querySelector('#image .views [data-view="picture"]').click();
const label = document.querySelector("#image .columns input:not(:checked)");
label.click(); seen.more = shown("picture");
const row = pictures.querySelector(".images"), box = row.querySelector(".frame").getBoundingClientRect();
const at = {bubbles: true, clientX: box.left + box.width / 4, clientY: box.top + box.height / 2, pointerType: "mouse"};
row.querySelector(".frame").dispatchEvent(new PointerEvent("pointermove", at));
seen.zoom = [...row.querySelectorAll('[data-view="picture"]')].map(one => getComputedStyle(one).transform);
seen.x = row.style.getPropertyValue("--x");
row.dispatchEvent(new PointerEvent("pointerleave", at));
seen.released = getComputedStyle(row.querySelector("img")).transform;
seen.broken = [...document.images].filter(one => one.complete && !one.naturalWidth).length;
seen.requests = performance.getEntriesByType("resource").map(one => one.name).filter(name => !name.startsWith("data:"));
seen.errors = errors;
document.body.dataset.seen = JSON.stringify(seen);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_sorts_switches_and_zooms(output, report, tmp_path):
    text = (output[0] / "compare.html").read_text()
    driven = tmp_path / "page.html"
    driven.write_text(text.replace("<title>", f"{PROBE}<title>").replace("</body>", DRIVE))
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
    profile, size = f"--user-data-dir={tmp_path}/profile", "--window-size=1400,1000"
    done = subprocess.run(
        [BROWSER, *options, profile, size, "--virtual-time-budget=2000", "--dump-dom", f"file://{driven}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    seen = json.loads(re.search(r"data-seen=\"([^\"]*)\"", done.stdout)[1].replace("&quot;", '"'))
    assert (seen["errors"], seen["requests"], seen["broken"]) == ([], [], 0)
    assert "CONSOLE" not in done.stderr
    psnr = sorted(point["metrics"]["psnr"] for point in report["tokenizers"][0]["points"])
    assert seen["rising"] == [*map(str, psnr), "failed", "failed"]
    assert seen["falling"] == [*map(str, psnr[::-1]), "failed", "failed"]
    codecs = sum("metrics" in codec for codec in report["tokenizers"][0]["points"][1]["codecs"].values())
    assert seen["pictures"] == 2 * (1 + 1 + codecs)  # two images; the original, one point, codecs
    assert (seen["tokens"], seen["more"]) == (2 * (1 + 1 + codecs), 2 * (1 + 2 + codecs))
    assert seen["left"] == 0
    assert set(seen["zoom"]) == {"matrix(5, 0, 0, 5, 0, 0)"}
    assert seen["x"] == "25%"
    assert seen["released"] == "none"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["limit=8"], "was begun with another limit"),
        (["encode.dualtoken-tiny={levels: 2}"], "was begun with another encode"),
        (["tokenizers=[aurora-tinny]"], "did you mean aurora-tiny"),
        (["tasks=[prob]"], "tasks has 'prob'; did you mean probe?"),
        (["weights.karl-tinny=x"], "did you mean karl-tiny"),
        (["encode=3"], "encode must be"),
        (["data=photos"], "asks about images; say labels="),
        (["data.path=x"], "the configuration has no 'data.path'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(output, broken, capfd, overrides, complaint):
    assert main([*arguments(output[0], broken), *overrides]) == 2
    error = capfd.readouterr().err.strip()
    assert complaint in error
    assert len(error.splitlines()) == 1, error


def test_where_nothing_could_be_measured_the_exit_code_says_so(tmp_path, broken, capfd):
    assert main(arguments(tmp_path, broken, "tasks=[reconstruction]", names=["broken"])) == 2
    assert "no tokenizer could be measured; broken: RuntimeError: the codebook <fell> off" in capfd.readouterr().err
    assert Path(tmp_path / "compare.html").is_file()


def test_all_is_what_has_weights_here():
    names, absent = command.chosen(command.cli.compose("compare"))
    assert {"karl-tiny", "ibq-tiny"} <= set(names)
    assert {"aurora-depth", "seed-2"} <= set(absent)
