"""The report in all its forms: JSON and its schema, HTML, Markdown, CSV; and comparing two."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from latentc.benchmarks.bench import cli, compare, model
from latentc.benchmarks.bench.model import Report
from latentc.benchmarks.bench.pages import html, texts
from latentc.cli import run as latentc
from latentc.runtimes.errors import InputError, PerformanceRegression
from tests.benchmarks_pages import Page, check_figures
from tests.support.bench_reports import make_report


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return make_report(batches=(1, 4), failed={"onnx-fp16": "timeout"}, images=tmp_path)


def test_the_json_fits_its_schema_and_reads_back(report: Report, tmp_path: Path) -> None:
    (tmp_path / model.REPORT).write_bytes(model.encode(report))
    assert model.read(tmp_path) == report
    document = json.loads((tmp_path / model.REPORT).read_text())
    schema = json.loads(CliRunner().invoke(cli.bench, ["schema"]).output)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    document["rows"][0]["p50"] = "fast"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "not a report of latentc bench"),
        (lambda text: "[]", "no report of latentc bench"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 7'), "version 7"),
        (lambda text: text.replace('"p50"', '"p51"', 1), "damaged"),
        (lambda text: text.replace('"case": "torch', '"case": "other', 1), "no case other"),
        (lambda text: text.replace('"rounds": 5', '"rounds": "many"', 1), "damaged"),
    ],
)
def test_a_damaged_report_is_refused(
    report: Report, tmp_path: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_bytes(model.encode(report))
    bad.write_text(damage(good.read_text()))
    assert latentc(["bench", "compare", str(good), str(bad)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(bad) in said
    assert latentc(["bench", "compare", str(good), str(tmp_path / "nowhere")]) == 2


def test_every_figure_of_the_page_stands_in_the_json(report: Report, tmp_path: Path) -> None:
    page = Page(html.page(report, tmp_path))
    check_figures(report, page)
    assert "svg" in page.tags
    refs = {pointer for pointer, _, _ in page.figures}
    # also the labels at the bars
    assert {"/rows/0/p50", "/cases/0/peak_memory"} <= refs


def test_the_page_needs_nothing_else(report: Report, tmp_path: Path) -> None:
    text = html.page(report, tmp_path)
    page = Page(text)
    assert not [a for a in page.addresses if not a.startswith(("#", "data:image/png;base64,"))]
    assert "http" not in text
    assert "@import" not in text
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    inside = set(re.findall(r"url\(#([^)]+)\)", text)) | {a[1:] for a in page.addresses
                                                          if a.startswith("#")}  # fmt: skip
    assert inside <= set(page.ids)


def test_large_images_are_small_on_the_page(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 384, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:64, :64]).save(tmp_path / "small.png")
    kind, content = html.small(tmp_path / "large.png")
    with Image.open(io.BytesIO(content)) as found:
        assert (kind, found.format, found.size) == ("webp", "WEBP", (192, 256))
    assert len(content) * 10 < (tmp_path / "large.png").stat().st_size
    assert html.small(tmp_path / "small.png") == ("png", (tmp_path / "small.png").read_bytes())


def test_charts_take_the_pages_colours(report: Report, tmp_path: Path) -> None:
    text = html.page(report, tmp_path)
    charts = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert charts.count("<svg") == 5  # scaling too: there are two batch sizes
    assert not re.search(r"#[0-9a-f]{6}", charts)
    assert "var(--ink)" in charts


def test_texts_are_escaped_and_failures_shown(report: Report, tmp_path: Path) -> None:
    text = html.page(report, tmp_path)
    assert "a &lt;large&gt; red circle" in text
    assert "it &lt;broke&gt; &amp; fell" in text
    assert "timeout" in text


def test_a_report_without_baseline_or_rows_still_makes_a_page(tmp_path: Path) -> None:
    report = make_report({})
    alone = msgspec.structs.replace(report, cases=[], rows=[], peaks=[], operations=[])
    assert "No build was compared" in html.page(alone, tmp_path)
    assert texts.markdown(alone)


def test_markdown_and_csv(report: Report) -> None:
    text = texts.markdown(report)
    for line in text.splitlines():
        if line.startswith("|"):
            columns = 7 if "interval" in line or "–" in line else None
            assert columns is None or line.count("|") == columns + 1
    assert "openvino-fp16" in text
    assert "**timeout**" in text
    rows = list(csv.DictReader(io.StringIO(texts.table_csv(report))))
    assert len(rows) == len(report.rows) + 1  # and the case that failed
    for row, mine in zip(rows, report.rows, strict=False):
        assert None not in row
        assert float(row["p50_s"]) == mine.p50
        assert float(row["limit_fraction"] or 0) == (mine.limit.fraction if mine.limit else 0)
        assert row["judge_images"] == "10"


@pytest.mark.parametrize(
    ("speeds", "words"),
    [
        ({"a": 2.0, "b": 3.0}, "b on engine is the fastest: "),
        ({"a": 0.4, "b": 0.5}, "PyTorch eager is the fastest: the best build, b on engine, has"),
        ({"a": 1.0}, "No build is faster than PyTorch eager beyond the noise"),
    ],
)
def test_the_winner_in_one_sentence(speeds: dict[str, float], words: str, tmp_path: Path) -> None:
    report = make_report(speeds)
    assert words in texts.verdict_sentence(report)
    plain = re.sub(r"<[^>]+>", "", html.page(report, tmp_path))
    assert texts.verdict_sentence(report) in " ".join(plain.split())


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0000123, "12.3 µs"), (0.0123, "12.3 ms"), (0.5, "500 ms"), (1.234, "1.23 s"),
     (100.4, "100 s")],
)  # fmt: skip
def test_times_have_three_digits(value: float, text: str) -> None:
    assert texts.seconds(value) == text


def test_two_runs_of_the_same_do_not_differ() -> None:
    changes = {
        line.change
        for seed in range(1, 6)
        for line in compare.compare(
            make_report(seed=100 * seed), make_report(seed=100 * seed + 50)
        ).lines
    }
    assert changes == {"no difference", "yardstick"}


def test_a_slower_machine_is_no_slower_build() -> None:
    """Both baselines are the same program: seconds are divided by theirs."""
    before, after = make_report(), make_report(seed=1000, machine_speed=0.5)
    found = compare.compare(before, after)
    assert not found.slower
    assert not compare.compare(after, before).slower
    assert compare.compare(before, after, seconds=True).slower
    assert all(line.divided for line in found.lines if line.case.startswith("latentc"))
    other = make_report(seed=1000, machine_speed=0.5, versions={"torch": "3.0"})
    found = compare.compare(before, other)
    assert found.slower
    assert "torch: 2.13.0 and 3.0" in found.remarks


def test_a_slower_build_is_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = make_report()
    after = make_report({"onnx-fp32": 1.5, "openvino-fp16": 3.0}, seed=1000)
    for name, report in (("before", before), ("after", after)):
        (tmp_path / name).mkdir()
        (tmp_path / name / model.REPORT).write_bytes(model.encode(report))
    paths = [str(tmp_path / "before"), str(tmp_path / "after")]
    assert latentc(["bench", "compare", *paths]) == PerformanceRegression.exit_code
    said = capsys.readouterr().out
    assert "slower" in said
    assert latentc(["bench", "compare", *paths, "--threshold", "0.5"]) == 0
    assert "no difference" in capsys.readouterr().out
    assert latentc(["bench", "compare", *paths, "--json"]) == PerformanceRegression.exit_code
    document = json.loads(capsys.readouterr().out)
    slow = [line for line in document["lines"] if line["change"] == "slower"]
    assert {line["label"] for line in slow} == {"onnx-fp32 on engine"}
    assert all(1.2 < line["ratio"] < 1.5 for line in slow)
    assert latentc(["bench", "compare", *reversed(paths)]) == 0
    assert "faster" in capsys.readouterr().out


def test_what_fails_now_or_is_gone_counts_as_slower() -> None:
    before = make_report(failed={"broken": "failed"})
    assert not compare.compare(before, before).slower
    fewer = make_report({"onnx-fp32": 2.0})
    assert {line.change for line in compare.compare(before, fewer).slower} == {"missing"}
    cases = [msgspec.structs.replace(c, status="timeout") if c.variant == "onnx-fp32" else c
             for c in before.cases]  # fmt: skip
    broken = msgspec.structs.replace(before, cases=cases)
    assert {line.change for line in compare.compare(before, broken).slower} == {"fails now"}
    assert "works now" in {line.change for line in compare.compare(broken, before).lines}
    with pytest.raises(InputError, match="no case in common"):
        compare.compare(before, msgspec.structs.replace(before, cases=[], rows=[]))


BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
                if (found := shutil.which(name))), None)  # fmt: skip
PROBE = """
<script>
window.addEventListener("load", () => {
  const seen = document.createElement("pre");
  const body = getComputedStyle(document.body);
  const boxes = [...document.querySelectorAll("svg, img")].map(e => e.getBoundingClientRect());
  const bars = [...document.querySelectorAll("figure svg text")];
  seen.id = "seen";
  seen.textContent = JSON.stringify({
    paper: body.backgroundColor, ink: body.color,
    empty: boxes.filter(b => b.width < 5 || b.height < 5).length, boxes: boxes.length,
    text: getComputedStyle(bars[0]).fill, wide: document.documentElement.scrollWidth,
    broken: [...document.images].filter(i => !i.naturalWidth).length,
    requests: performance.getEntriesByType("resource")
      .filter(r => !r.name.startsWith("data:")).length,
  });
  document.body.append(seen);
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page(report: Report, tmp_path: Path, dark: bool) -> None:
    """Rendered in a headless browser: nothing on its console, nothing empty, nothing loaded."""
    path = tmp_path / "report.html"
    path.write_text(html.page(report, tmp_path).replace("</body>", PROBE + "</body>"))
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", *scheme,
         "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    match = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)
    assert match, done.stdout[-500:]
    seen = json.loads(match[1])
    assert seen["paper"] == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    assert seen["text"] in (seen["ink"], "rgb(154, 164, 175)", "rgb(104, 113, 124)")
    assert (seen["empty"], seen["broken"], seen["requests"]) == (0, 0, 0)
    assert seen["boxes"] >= 9
    assert seen["wide"] <= 1200
