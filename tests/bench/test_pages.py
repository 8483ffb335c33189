"""What pages show is what was committed; made-up GPU results show goals, and losses as losses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from vertebra._cli._reference import parts
from vertebra.bench import traffic
from vertebra.bench.ceilings import Ceilings
from vertebra.bench.pages import figures, marks, site
from vertebra.bench.pages.sources import Sources
from vertebra.bench.results import Comparison, Report, Row

ROOT = Path(__file__).parents[2]
LINES = [traffic.Line("relu", "", traffic.Maps(2, 3), traffic.Maps(4, 3))]


# the repository


@pytest.mark.parity
def test_every_page_is_in_step(torchvision: Any, timm: Any, transformers: Any) -> None:
    """Else: `python -m vertebra report`."""
    from typer.main import get_command

    from vertebra.__main__ import app

    sources = Sources(ROOT)
    assert list(site.out_of_step(ROOT, sources, parts(get_command(app)))) == []
    assert all(versions for *_, versions in sources.drop_in)


# made-up results


def row(provider: str, ms: float, peer: bool = True, **more: Any) -> Row:
    return Row(provider, peer, calls_per_sample=3, samples_ms=[ms, 1.02 * ms, 0.99 * ms], **more)


def environment(device: str = "NVIDIA H200") -> dict[str, Any]:
    gpu = {"driver": "580.1"} if "NVIDIA" in device else {}
    return {"device": device, "torch": "2.11", "triton": "3.6", "python": "3.12", "cores": 2,
            "commit": "0123456789abcdef-dirty", **gpu}  # fmt: skip


def model(name: str, mode: str, ours: float, peer: float, batch: int = 256, **more: Any) -> Report:
    """Return a run of one comparison of milliseconds."""
    facts = {"model": name, "mode": mode, "batch": batch, "dtype": "bf16", "image_size": 224}
    rows = [row("eager-nhwc", peer, saved_bytes=1000), row("compile", 2 * peer)]
    rows.append(row("vertebra-nhwc", ours, False, saved_bytes=more.pop("saved", None)))
    comparison = Comparison(f"{name} {mode}, 256 x 224", rows, {"images": batch}, facts)
    kind = {"forward": "models", "sgd": "train"}[mode]
    return Report(kind, environment(**more), {}, [comparison])


def kernel(ours: float) -> Report:
    facts = {"op": "layer_norm_2d", "shape": [2, 3, 4, 4], "layout": "nhwc", "options": "affine",
             "direction": "forward", "path": "triton", "dtype": "bf16"}  # fmt: skip
    rows = [row("eager", 2.0), row("vertebra", ours, False)]
    comparison = Comparison("layer_norm_2d", rows, {"bytes": 1e9}, facts)
    ceilings = Ceilings(1e12, {"fp32": 1e13}, 1e13)  # a copy moves that in 1 ms
    return Report("kernels", environment(), {}, [comparison], ceilings=ceilings)


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return what a part holds, given runs."""
    monkeypatch.setattr(Sources, "traffic", LINES)

    def of(name: str, **runs: Report) -> str:
        for stem, run in runs.items():
            run.save(tmp_path / "bench/results" / f"{stem}.json")
        return site.PARTS[name](Sources(tmp_path))

    return of


@pytest.mark.parametrize("name", ["main", "models", "train", "compile", "kernels", "overhead"])
def test_without_results_a_sentence_says_so(name: str, content) -> None:
    text = content(name)
    assert re.fullmatch(r"No GPU run of .* has been committed yet\.", text)


def test_goals_stand_beside_what_is_reached(content) -> None:
    text = content("models", gpu=model("resnet50", "forward", 256e3 / 60e3, 10.0))
    assert "| resnet50 | 256 | 60,000 (vertebra-nhwc) | 25,600 (eager-nhwc) |" in text
    assert "| faster | 48,000 | 125% | 74,000 |" in text
    assert "has been committed" not in text


def test_a_goal_missed_and_a_loss_are_called_so(content) -> None:
    text = content("train", gpu=model("resnet50", "sgd", 30.0, 20.0, saved=800))
    assert "| 0.67 [0.67 to 0.67] | **loss** | 10,200 | 84%, missed | 12,600 |" in text
    assert "| 0.80, missed | 0.77 |" in text
    assert "a loss: slower than the fastest peer" in text
    assert "`0123456789` with changes" in text


def test_goals_are_for_one_machine_and_large_batches(content) -> None:
    for other in (
        model("resnet50", "forward", 5.0, 10.0, batch=64),
        model("resnet50", "forward", 5.0, 10.0, device="NVIDIA H100"),
        model("resnet26", "forward", 5.0, 10.0),
    ):
        assert "goal" not in content("models", gpu=other)


def test_a_run_on_a_cpu_says_that_it_is_noisy(content) -> None:
    text = content("models", cpu=model("resnet50", "forward", 5.0, 10.0, device="AMD EPYC"))
    assert text.startswith("No GPU run of `vertebra bench models` has been committed yet.")
    assert "noisy" in text


@pytest.mark.parametrize(("ms", "reached"), [(1.05, 1), (1.5, 0)])
def test_ops_stand_beside_a_copy(ms: float, reached: int, content) -> None:
    text = content("kernels", gpu=kernel(ms))
    assert f"{reached} of 1 reach it" in text
    assert f"| {1 / ms:.0%} |" in text


def test_a_wrong_answer_is_shown(content) -> None:
    run = model("resnet50", "forward", 5.0, 10.0)
    run.comparisons[0].rows.append(Row("max-autotune", True, "WRONG", "logits:\nerror 1 > 0.1"))
    text = content("models", gpu=run)
    assert "max-autotune: WRONG, logits: error 1 > 0.1" in text
    assert "| max-autotune | WRONG |" in text


def test_the_headline_is_a_gpus_where_there_is_one(content) -> None:
    main = model("resnet50", "forward", 5.0, 10.0, device="AMD EPYC")
    main.kind = "main"
    text = content("headline", main=main)
    assert "| **vertebra-nhwc** | 51,200 | 2.00 |" in text
    assert "traffic.png" in text
    text = content("headline", gpu=model("resnet50", "forward", 5.0, 10.0))
    assert "51,200 (vertebra-nhwc)" in text
    assert "gpu.png" in text
    assert "traffic.png" not in text


def test_an_unknown_kind_is_refused(content) -> None:
    with pytest.raises(ValueError, match=r"other.json must be a run of the kind .* got 'other'"):
        content("main", other=Report("other", environment(), {}))


def test_compilation_is_shown_by_what_is_asked(content) -> None:
    def ask(aspect: str, rows: list[Row]) -> Comparison:
        facts = {"model": "resnet18", "block": "layer1.0", "aspect": aspect, "mode": "default",
                 "direction": "forward", "policy": "marked"}  # fmt: skip
        return Comparison(f"resnet18: {aspect}", rows, {"images": 4}, facts)

    def traced(**more: Any) -> dict[str, Any]:
        here = {"operations": {"forward": 31, "backward": 77}, "opaque": {}}
        return {"graphs": 1, "breaks": 0, "here": here, **more}

    late = Row("compile", True, "late")
    ours = Row("vertebra-compile", False, facts=traced(on_triton={"opaque": {"bn": 5, "pool": 1}}))
    starts = [{"restart_s": 3.0}, {"restart_s": 5.0}]
    comparisons = [
        ask("graphs", [Row("compile", True, facts=traced()), ours]),
        ask("starts", [row("compile", 9e3, facts={"starts": starts}), row("vertebra", 50, False)]),
        ask("steady", [row("compile", 4.0), row("vertebra-compile", 5.0, False), late]),
        ask("shapes", [Row("compile", True, facts={"recompiled": 2, "stalled_s": 30.04})]),
    ]
    comparisons[2].rows[2].provider = "accelerated"
    text = content("compile", cpu=Report("compile", environment("AMD"), {}, comparisons))
    where = "| resnet18 layer1.0 | forward |"
    assert f"{where} compile | 1 | 0 | 31 | 77 | 0 |" in text
    assert f"{where} vertebra-compile | 1 | 0 | 31 | 77 | 6 |" in text
    assert f"{where} default | 9.0, 4.0 cached | 0.1 |" in text
    assert f"{where} default | 1,000 | 800, 0.80x, **loss** | late |" in text
    assert f"{where} marked | 2, 30.0 s |" in text
    assert "Of 2 questions ours wins 0, ties in 1 and loses 1." in text
    assert "a loss: resnet18 layer1.0 inference, steady speed" in text


# pages


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkout of two parts, a run and no charts yet."""
    monkeypatch.setattr(Sources, "traffic", LINES)
    monkeypatch.setattr(site, "PARTS", {n: site.PARTS[n] for n in ("models", "traffic-chart")})
    (tmp_path / "docs/deep").mkdir(parents=True)
    (tmp_path / "mkdocs.yml").touch()
    (tmp_path / "README.md").write_text("a\n<!-- report: models -->\nold\n<!-- end -->\nb\n")
    page = "<!-- report: traffic-chart -->\n<!-- end -->\n"
    (tmp_path / "docs/deep/page.md").write_text(page)
    run = model("resnet50", "forward", 5.0, 10.0)
    run.save(tmp_path / "bench/results/gpu-models.json")
    return tmp_path


def test_writing_leaves_nothing_out_of_step(checkout: Path) -> None:
    assert len(list(site.out_of_step(checkout))) == 2 + 4
    assert len(site.write(checkout)) == 2 + 4
    assert list(site.out_of_step(checkout)) == []
    assert site.write(checkout) == []
    readme = (checkout / "README.md").read_text()
    assert readme.startswith("a\n<!-- report: models -->\n###")
    assert readme.endswith("<!-- end -->\nb\n")
    assert 'src="docs/assets/gpu-models.png"' in readme
    assert 'src="../assets/traffic.png"' in (checkout / "docs/deep/page.md").read_text()


def test_what_is_edited_or_measured_again_is_named(checkout: Path) -> None:
    site.write(checkout)
    readme = checkout / "README.md"
    readme.write_text(readme.read_text().replace("51,200", "91,200"))
    assert list(site.out_of_step(checkout)) == ["README.md: models"]
    site.write(checkout)
    path = checkout / "bench/results/gpu-models.json"
    content = json.loads(path.read_text())
    content["comparisons"][0]["rows"][2]["samples_ms"][0] = 4.9
    path.write_text(json.dumps(content))
    charts = ["docs/assets/gpu-models.png: the chart", "docs/assets/gpu-models-dark.png: the chart"]
    assert list(site.out_of_step(checkout)) == ["README.md: models", *charts]
    site.write(checkout)
    (checkout / "docs/assets/traffic.png").unlink()
    assert list(site.out_of_step(checkout)) == ["docs/assets/traffic.png: the chart"]


def test_a_part_that_no_page_has_is_named(checkout: Path) -> None:
    site.write(checkout)
    (checkout / "docs/deep/page.md").unlink()
    assert list(site.out_of_step(checkout)) == ["no page has <!-- report: traffic-chart -->"]


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("<!-- report: models -->\n", "pairs"),
        ("<!-- end -->\n", "pairs"),
        ("<!-- report: models --> x\n<!-- end -->\n", "line of its own"),
        ("<!-- report: modles -->\n<!-- end -->\n", "got modles"),
    ],
)
def test_wrong_marks_are_refused(page: str, said: str, checkout: Path) -> None:
    (checkout / "README.md").write_text(page)
    for call in (site.write, lambda root: list(site.out_of_step(root))):
        with pytest.raises(ValueError, match=rf"README.md: .*{said}"):
            call(checkout)


def test_marks() -> None:
    page = "a\n<!-- report: x -->\n1\n<!-- end -->\n<!-- report: y -->\n<!-- end -->\n"
    assert marks.names(page) == ["x", "y"]
    assert marks.part(page, "x") == "1\n"
    filled = marks.fill(page, str.upper)
    assert (marks.part(filled, "x"), marks.part(filled, "y")) == ("X\n", "Y\n")
    assert filled.startswith("a\n<!-- report: x -->")


def test_the_command(checkout: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from vertebra.__main__ import app

    def run(*options: str) -> Any:
        return testing.CliRunner().invoke(app, ["report", "--root", str(checkout), *options])

    own = "".join(f"<!-- report: {name} -->\n<!-- end -->\n" for name in ("commands", "list"))
    (checkout / "docs/commands.md").write_text(own)  # parts that the commands themselves add
    stale = run("--check")
    assert stale.exit_code == 1
    assert "out of step: README.md: models" in stale.output
    assert run().exit_code == 0
    assert run("--check").exit_code == 0
    (checkout / "mkdocs.yml").unlink()
    assert run("--check").exit_code == 2


# charts


def test_a_digest_is_of_all_that_is_shown(tmp_path: Path) -> None:
    def chart(value: float = 1.0, unit: str = "s", line: float = 2.0) -> figures.Chart:
        rows = [figures.Row("a", [figures.Mark("vertebra", value, 0.9, 1.1)])]
        return figures.Chart("alt", [figures.Panel("t", unit, rows, {"goal": line})], bars=True)

    one = chart()
    assert chart(1.0 + 1e-9).digest == one.digest
    assert len({one.digest, chart(1.1).digest, chart(unit="ms").digest, chart(line=3).digest}) == 4
    figures.draw(one, tmp_path, "one")
    assert {figures.digest_of(path) for path in figures.paths(tmp_path, "one")} == {one.digest}
    assert figures.digest_of(tmp_path / "other.png") is None
