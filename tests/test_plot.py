"""Figures: the points themselves, every kind of figure, and errors for wrong files."""

import json
from pathlib import Path

import pytest

from common.glue import GLUE_TASKS
from tools import plot
from tools.figures import glue, reading

ROOT = Path(__file__).parent.parent
LOG = ROOT / "results" / "base_wikipedia_h100.jsonl"


def write_results(path, step=100, cola=(50.0,), rte=(60.0,), model="mosaicbert", recipe="mosaic", **pretraining):
    pretraining = {"step": step, "gpu_hours": step / 1000, "dollars": step / 400, **pretraining}
    tasks = {
        name: {
            "scores": list(scores),
            "score": sum(scores) / len(scores),
            "score_ci95": 1.0 if len(scores) > 1 else None,
        }
        for name, scores in (("cola", cola), ("rte", rte))
    }
    path.mkdir(parents=True)
    about = {"recipe": recipe, "model": model, "num_layers": 12, "pretraining": pretraining}
    (path / "glue.json").write_text(json.dumps({"tasks": tasks, **about}))
    return str(path / "glue.json")


def write_bench(path):
    """A result of studies.bench: two operators, one not measured, and a row of steps."""

    def operator(row, entry, forward, backward):
        parts = {"forward": forward, "backward": backward, "both": forward + backward}
        parts = {name: {"ns_per_token": value, "ceiling_ns_per_token": 2.5} for name, value in parts.items()}
        return {"row": row, "entry": entry, **parts}

    rows = [
        {"row": "ceiling", "entry": "copy", "rate": "3 TB/s"},
        {"row": "step_full", "entry": "ours", "samples_per_second": 4321.0},
        {"row": "step_full", "entry": "flex_t2", "samples_per_second": 4100.0},
        operator("geglu", "ours", 3.0, 4.25),
        operator("geglu", "compiled_t2", 4.0, 5.0),
        {"row": "geglu", "entry": "liger", "not_measured": "needs the package liger-kernel"},
    ]
    path.write_text(json.dumps({"device": "Some GPU", "rows": rows}))
    return str(path)


def scaling_row(model, batch, gpus, samples, **values):
    rate = samples * 10
    return {
        "model": model, "batch": batch, "gpus": gpus, "samples": samples, "ms": 100.0, "samples_per_second": rate,
        "mfu": None, "measured_ms": None, "efficiency": None if gpus == 1 else 0.9, **values,
    }  # fmt: skip


def write_scaling(path, predicted=True):
    """A result of studies.scaling: two models on one and two GPUs, one of them predicted for more."""
    rows = [
        scaling_row(model, batch, gpus, 64 if batch == "global" else 16 * gpus)
        for model in ("base", "bert")
        for batch in ("global", "per_gpu")
        for gpus in (1, 2)
    ]
    rows.append({"model": "large", "gpus": 2, "not_measured": "ended with status 1"})
    results = {"device": "Some GPU", "toy": False, "global_batch_size": 64, "per_gpu": 16, "rows": rows}
    if predicted:
        results["predicted"] = [
            scaling_row("base", "global", 2, 64, measured_ms=90.0, samples_per_second=1),
            *(scaling_row("base", "global", gpus, 64) for gpus in (4, 8)),
        ]
    path.write_text(json.dumps(results))
    return str(path)


def test_scaling(tmp_path, capsys):
    """Measured points are drawn as measured; only the rest is drawn as predicted."""
    from matplotlib import pyplot

    figure = plot.plot_scaling(plot.PlotConfig(scaling=write_scaling(tmp_path / "scaling.json")), pyplot)
    upper = figure.axes[0]
    lines = [(line.get_linestyle(), list(line.get_xdata())) for line in upper.get_lines()]
    assert ("-", [1, 2]) in lines and ("--", [2, 4, 8]) in lines
    labels = upper.get_legend_handles_labels()[1]
    assert labels[:2] == ["MosaicBERT-Base", "BERT-Base, compiled"] and "published" in labels[2]
    assert figure.axes[2].get_ylabel() == "efficiency (%)"  # this GPU's peak is unknown
    pyplot.close(figure)
    figure = plot.plot_scaling(plot.PlotConfig(scaling=write_scaling(tmp_path / "measured.json", predicted=False)), pyplot)
    assert {line.get_linestyle() for axes in figure.axes for line in axes.get_lines()} <= {"-", "None"}
    pyplot.close(figure)


def test_what_one_file_measured_another_does_not_predict(tmp_path):
    """Four GPUs, predicted in the first file, are measured in the second."""
    from matplotlib import pyplot

    more = {"device": "x", "toy": False, "rows": [scaling_row("base", "global", n, 64) for n in (2, 4)]}
    more["rows"][0]["samples_per_second"] = 1  # the first file's counts
    (tmp_path / "more.json").write_text(json.dumps(more))
    files = f"{write_scaling(tmp_path / 'scaling.json')},{tmp_path}/more.json"
    figure = plot.plot_scaling(plot.PlotConfig(scaling=files), pyplot)
    lines = [(line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].get_lines()]
    assert ("-", [1, 2, 4], [640, 640, 640]) in lines and ("--", [4, 8], [640, 640]) in lines
    pyplot.close(figure)


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        plot.main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_curves(tmp_path):
    """Two pretraining seeds of one length make one point; the band spans the lowest to the highest seed."""
    paths = [
        write_results(tmp_path / "a", 100, cola=(40.0, 44.0), rte=(60.0, 62.0), gpu_hours=0.1),
        write_results(tmp_path / "b", 100, cola=(46.0, 50.0), rte=(64.0,), gpu_hours=0.3),
        write_results(tmp_path / "c", 200, cola=(52.0,), rte=(70.0,)),
    ]
    # a: 50 and 53; b: 55 and 57, its one RTE seed counted with both
    points = glue.curves(paths, ["x"] * 3, "gpu_hours", ["cola", "rte"])
    assert points["x"][0] == pytest.approx((0.2, (51.5 + 56.0) / 2, 50.0, 57.0))
    assert points["x"][1] == pytest.approx((0.2, 61.0, 61.0, 61.0))
    assert glue.curves(paths, ["x", "x", "y"], "dollars", ["cola"])["y"] == [(0.5, 52.0, 52.0, 52.0)]


def test_two_recipes_of_one_run_are_two_curves(tmp_path, capsys):
    from matplotlib import pyplot

    paths = [write_results(tmp_path / recipe, recipe=recipe, cola=(40.0,)) for recipe in ("mosaic", "fast")]
    for chosen, names in ((paths, ["12 layers, mosaic", "12 layers, fast"]), (paths[:1], ["12 layers"])):
        figure = plot.plot_pareto(plot.PlotConfig(pareto=",".join(chosen)), pyplot)
        labels = figure.axes[0].get_legend_handles_labels()[1]
        assert labels[:-1] == [f"MosaicBERT, {name}" for name in names] and "published: the same tasks" in labels[-1]
        pyplot.close(figure)


def test_published_points():
    """Hours are of eight GPUs at $2.50 each: the original's own 9.65 h and 84.3."""
    step, hours, score = glue.PUBLISHED["MosaicBERT-Base"][-1]
    assert glue.published_x("gpu_hours", step, hours) == pytest.approx(77.2)
    assert glue.published_x("dollars", step, hours) == pytest.approx(193.0)
    assert glue.published_x("step", step, hours) == 70000
    five = ["rte", "sst2", "mrpc", "cola", "stsb"]  # an eight-task mean beside a five-task mean would compare nothing
    ((label, ((_, mean),)),) = glue.published_points("dollars", five).items()
    assert label.startswith("MosaicBERT-Base") and mean == pytest.approx((81.36 + 92.46 + 90.03 + 55.11 + 89.27) / 5)
    assert [len(points) for points in glue.published_points("dollars", list(reading.TASK_NAMES)).values()] == [10, 10]
    assert sum(glue.PUBLISHED_TASKS.values()) / 8 == pytest.approx(84.28, abs=0.005) and score == pytest.approx(84.26)


def test_figures_are_drawn_and_equal_inputs_give_equal_bytes(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    a = write_results(tmp_path / "a", cola=(50.0, 52.0))
    b = write_results(tmp_path / "b", 300, cola=(-5.0,))
    c = write_results(tmp_path / "c", 300, model="bert")
    for name, lengths in (("one", {"1-1": 1, "2048-4095": 2}), ("two", {"1-1": 30, "2-3": 10})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps({"lengths": lengths}))
    kinds = {
        "loss": ([f"--loss={LOG}", "--x=gpu_hours"], ["base_wikipedia_h100, held out", "GPU-hours"]),
        "glue": ([f"--glue={a},{tmp_path / 'b'}", "--labels=one,two"], ["CoLA", "RTE", "one", "two", "51.0"]),
        "pareto": (
            [f"--pareto={tmp_path}/*/glue.json"],
            ["MosaicBERT, 12 layers", "MosaicBERT-Base, published: the same tasks", "RTE, CoLA"],
        ),
        "kernels": (
            [f"--kernels={write_bench(tmp_path / 'bench.json')}"],
            [
                "Some GPU", "whole step, no padding", "GeGLU", "compiled, tuned more", "FlexAttention, tuned more", "7.2", "9.0",
                "4,321", "dashed: limit", "Liger", "not measured: needs the package liger-kernel",
            ],
        ),
        "lengths": (
            [f"--lengths={tmp_path}/one/report.json,{tmp_path}/two"],
            ["one: 3 documents", "two: 40 documents", "512", "2,048", "% of documents", "tokens in a document"],
        ),
        "tasks": ([f"--pareto={a},{b},{c}", "--tasks=true", "--x=dollars"], ["mean of 2 tasks", "CoLA", "US dollars"]),
    }
    for name, (argv, words) in kinds.items():
        figure, again = tmp_path / f"{name}1.svg", tmp_path / f"{name}2.svg"
        plot.main([*argv, f"--out={figure}"])
        plot.main([*argv, f"--out={again}"])
        text = figure.read_text()
        assert not [word for word in words if word not in text]
        assert figure.read_bytes() == again.read_bytes()
    figures = [tmp_path / "one.png", tmp_path / "one.pdf"]
    plot.main([*kinds["glue"][0], f"--out={','.join(map(str, figures))}"])
    assert all(figure.stat().st_size > 5000 for figure in figures)
    capsys.readouterr()


@pytest.mark.parametrize("devices, hours", [(["x86_64"], "CPU-hours"), (["NVIDIA H200", "aarch64"], "GPU-hours and CPU-hours")])
def test_cpu_time_is_not_called_gpu_time(tmp_path, devices, hours):
    scores, logs = [], []
    for device in devices:
        scores.append(write_results(tmp_path / device, device=device))
        logs.append(str(tmp_path / device / "log.jsonl"))
        text = "".join(json.dumps(record) + "\n" for record in (
            {"event": "start", "device": device, "config": {}}, {"event": "train", "step": 1, "loss": 2.0, "gpu_hours": 1.0},
        ))  # fmt: skip
        Path(logs[-1]).write_text(text)
    for argv in (f"--pareto={','.join(scores)}", f"--loss={','.join(logs)}"):
        for x, words in (("gpu_hours", hours), ("gpu_minutes", hours.replace("hours", "minutes"))):
            plot.main([argv, f"--x={x}", f"--out={tmp_path}/figure.svg"])
            assert f">{words}{' of pretraining' * ('pareto' in argv)}<" in (tmp_path / "figure.svg").read_text()


def test_bars_of_a_part_of_the_data_say_so():
    from matplotlib import pyplot

    files = ",".join(f"{ROOT}/results/glue_h100/{name}/glue.json" for name in ("fast", "qqp_subset"))
    figure = plot.plot_glue(plot.PlotConfig(glue=files), pyplot)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["fast", "qqp_subset (QQP: 6 % of the training data)"]
    pyplot.close(figure)


def test_marks_of_parts_fit_into_the_figure(tmp_path):
    """Titles ran into each other and off the right edge, and a legend in one line made a figure 31 inches wide."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    tasks = {
        name: {"scores": [50.0], "score": 50.0, "score_ci95": None, "train_examples": 200, "dev_examples": 100, "metrics": {}}
        for name in GLUE_TASKS
    }
    path = Path(write_results(tmp_path / "run"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": tasks}))
    figure = plot.plot_pareto(plot.PlotConfig(pareto=str(path), tasks=True), pyplot)
    figure.canvas.draw()
    boxes = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    assert len(boxes) == 9 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)
    pyplot.close(figure)
    figure = plot.plot_glue(plot.PlotConfig(glue=str(path)), pyplot)
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert figure.get_figwidth() < 12 and 0 <= legend.x0 and legend.x1 <= figure.bbox.width
    assert legend.y1 <= min(axes.get_tightbbox().y0 for axes in figure.axes)
    pyplot.close(figure)


def test_errors(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    good = write_results(tmp_path / "a")
    bad = tmp_path / "bad.json"
    bad.write_text('{"tasks": 3')
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"event": "start"}\n')
    assert "give one of" in fails(capsys)
    assert "give one of" in fails(capsys, f"--glue={good}", f"--loss={LOG}")
    assert "no such file" in fails(capsys, "--glue=nowhere/*.json")
    assert "glue.json: No such file" in fails(capsys, f"--glue={ROOT / 'tests'}")
    assert f"{bad}: not a glue.json" in fails(capsys, f"--glue={bad}")
    assert f"{good}:1: not a log.jsonl" in fails(capsys, f"--loss={good}")
    assert f"{bad}: not a report.json" in fails(capsys, f"--lengths={bad}")
    assert f"{good}: not a report.json" in fails(capsys, f"--lengths={good}")
    assert "report.json: No such file" in fails(capsys, f"--lengths={ROOT / 'tests'}")
    assert "no training steps" in fails(capsys, f"--loss={empty}")
    assert f"{bad}: not a result of python -m studies.bench" in fails(capsys, f"--kernels={bad}")
    assert "nowhere.json: no such file" in fails(capsys, "--kernels=nowhere.json")
    nothing = tmp_path / "nothing.json"
    nothing.write_text('{"device": "x", "rows": [{"row": "a", "entry": "b", "not_measured": "c"}]}')
    assert "no operators and no steps" in fails(capsys, f"--kernels={nothing}")
    assert "--labels: 2 given, and 1 needed (" in fails(capsys, f"--glue={good}", "--labels=a,b")
    assert "--held_out: means nothing without" in fails(capsys, f"--glue={good}", "--held_out")
    assert "unknown suffix" in fails(capsys, f"--glue={good}", "--out=a.gif")
    assert "not for --pareto" in fails(capsys, f"--pareto={good}", "--x=tokens")
    no_price = write_results(tmp_path / "b", dollars=None)
    assert f"{no_price}: holds no dollars" in fails(capsys, f"--pareto={no_price}", "--x=dollars")
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps({**json.loads(Path(good).read_text()), "pretraining": None}))
    assert "does not know what pretraining cost" in fails(capsys, f"--pareto={foreign}")
    many = [write_results(tmp_path / f"m{i}") for i in range(17)]
    assert "17 labels, at most 16" in fails(capsys, f"--glue={','.join(many)}")


def test_many_own_results_have_room(tmp_path):
    """Sixteen runs with long names: every bar has its own style, and the legend lies inside the figure with all of them."""
    from matplotlib import pyplot

    paths = []
    for i in range(16):
        path = Path(write_results(tmp_path / f"a_run_with_quite_a_long_name_and_learning_rate_{i}"))
        own = {"metrics": {"accuracy": {}, "macro_f1": {}}, "score": 60.0 + i, "score_ci95": None}
        path.write_text(json.dumps({"model": "bert", "tasks": {"own": own}}))
        paths.append(str(path))
    figure = plot.plot_glue(plot.PlotConfig(glue=",".join(paths)), pyplot)
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [Path(path).parent.name for path in paths]
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and figure.axes[0].get_window_extent().height > 200
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in figure.axes[0].patches}) == 16
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["own labels:\nmean of accuracy\nand macro_f1"]
    pyplot.close(figure)


def test_scores_of_different_kinds_are_different_groups(tmp_path):
    """A regression on own labels, a classification on own labels: their groups name what their scores are the mean of."""
    from matplotlib import pyplot

    for name, metrics in (("score", ("pearson", "spearman", "mean_error")), ("labels", ("accuracy", "macro_f1"))):
        (tmp_path / name).mkdir()
        own = {"metrics": dict.fromkeys(metrics, {}), "score": 60.0, "score_ci95": None}
        (tmp_path / name / "glue.json").write_text(json.dumps({"model": "bert", "tasks": {"own": own}}))
    figure = plot.plot_glue(plot.PlotConfig(glue=f"{tmp_path}/score,{tmp_path}/labels"), pyplot)
    figure.canvas.draw()
    labels = figure.axes[0].get_xticklabels()
    means = ["mean of pearson\nand spearman", "mean of accuracy\nand macro_f1"]
    assert [label.get_text() for label in labels] == [f"own labels:\n{mean}" for mean in means]
    assert labels[0].get_window_extent().x1 < labels[1].get_window_extent().x0
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in figure.axes[0].patches] == [0, 1]
    pyplot.close(figure)


def write_log(directory):
    records = ({"event": "start", "config": {"model": "mosaicbert"}}, {"event": "train", "step": 1, "loss": 2.0},
               {"event": "eval", "step": 1, "loss": 2.0})  # fmt: skip
    directory.mkdir()
    (directory / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_held_out_losses_are_named_by_their_runs(tmp_path):
    """Two runs of one model are two curves; of a race's runs, those with equal configs are one."""
    from matplotlib import pyplot

    names = {"a": "a", "b": "b", "mosaicbert_2min_seed17": "MosaicBERT", "mosaicbert_2min_seed18": None}
    for name in names:
        write_log(tmp_path / name)
    paths = ",".join(f"{tmp_path}/{name}" for name in names)
    figure = plot.plot_loss(plot.PlotConfig(loss=paths, held_out=True), pyplot)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == [label for label in names.values() if label]
    assert len({line.get_color() for line in figure.axes[0].get_lines()}) == 3
    pyplot.close(figure)


def test_a_pattern_takes_the_directories_that_have_it(tmp_path, capsys):
    """The others, and files beside them, are passed over; what is named, or a pattern without any, is an error."""
    for i in range(17):
        write_results(tmp_path / f"out/tuned{i}")
    write_log(tmp_path / "out/run")
    for name in ("data", "out/[run]"):
        (tmp_path / name).mkdir()
    (tmp_path / "out/h.svg").write_text("")
    log, glue_files = f"{tmp_path}/out/run/log.jsonl", [f"{tmp_path}/out/tuned{i}/glue.json" for i in range(17)]
    assert reading.find(f"{tmp_path}/out/*", "log.jsonl") == [log]
    assert reading.find(f"{tmp_path}/out/*", "glue.json") == sorted(glue_files)
    assert reading.find(f"{tmp_path}/*/run/log.jsonl,{tmp_path}/o*/run", "log.jsonl") == [log] * 2
    plot.main([f"--loss={tmp_path}/out/*", f"--out={tmp_path}/l.svg"])
    assert capsys.readouterr().err == ""
    assert "tuned1/log.jsonl: No such file" in fails(capsys, f"--loss={tmp_path}/out/*,{tmp_path}/out/tuned1")
    assert "[run]/log.jsonl: No such file" in fails(capsys, f"--loss={tmp_path}/out/[run]")
    error = fails(capsys, f"--loss={tmp_path}/d*")
    assert error == f"error: {tmp_path}/d*: no such file (expected log.jsonl, or a directory with it)"


def test_a_log_with_a_cut_last_line(tmp_path, capsys):
    lines = LOG.read_text().splitlines(keepends=True)
    whole = reading.read_log(LOG)
    for cut in (2, 10, len(lines[-1]) - 1):
        path = tmp_path / "log.jsonl"
        path.write_text("".join(lines)[:-cut])
        capsys.readouterr()
        assert reading.read_log(path) == whole[:-1]
        assert f"{path}:{len(lines)}: the last line was cut, and is left out" in capsys.readouterr().err
    path.write_text("".join(lines[:3]) + lines[3][:20] + "\n" + lines[4])  # not the last one: not what a kill leaves
    assert f"{path}:4: not a log.jsonl" in fails(capsys, f"--loss={path}")


@pytest.mark.parametrize("option", ["loss", "glue", "pareto", "kernels", "scaling", "lengths"])
@pytest.mark.parametrize("contents", ["[]", "3", "{}", "[" * 100_000, '{"a": ' + "[" * 100_000, ""])
def test_strange_json(tmp_path, capsys, option, contents):
    path = tmp_path / "strange.json"
    path.write_text(contents + "\n")
    assert f"{path}" in fails(capsys, f"--{option}={path}", f"--out={tmp_path}/x.svg")
