"""Laws: recovered where they hold, refused where they don't, with intervals that cover; what follows."""

import json
import re

import lmfit
import numpy as np
import pytest
from scipy import optimize

import LakhMIDI as study
from LakhMIDI import Cfg, UserError, fit_parametric_loss, fit_power_law, main

SIZES = np.geomspace(8e5, 1e8, 5)
# char-level Lakh ABC, one seed each, nats per character: the table that two public exponents rest on
GPT = [801152, 4176720, 18643240, 55444740, 99209472], [0.5633, 0.4595, 0.4280, 0.4132, 0.4088]
LSTM = [925921, 3728993, 23194721, 49319777, 96572769], [0.6650, 0.5714, 0.4825, 0.4622, 0.4457]


def law(N, alpha=0.4, share=0.6, least=0.5):
    """A law whose offset is `share` of the loss `least` at the largest size."""
    return least * (share + (1 - share) * (np.asarray(N) / np.max(N)) ** -alpha)


def noise(sd, n, seed=0):
    return np.exp(sd * np.random.default_rng(seed).normal(size=n))


def surface(sd=0.0, seed=0, sizes=5, budgets=3, own=0.5):
    """(N, D, L, run) of L = .35 + 40 / N^.4 + 300 / D^.45; runs share all but `own` of their noise."""
    rng, run = np.random.default_rng(seed), np.repeat(np.arange(sizes), budgets)
    N, D = np.geomspace(1e6, 1e8, sizes)[run], np.tile(np.geomspace(2.5e7, 1e8, budgets), sizes)
    spread = sd * (np.sqrt(1 - own**2) * rng.normal(size=sizes)[run] + own * rng.normal(size=len(run)))
    return N, D, (0.35 + 40 * N**-0.4 + 300 * D**-0.45) * np.exp(spread), run


@pytest.mark.parametrize("alpha, c, first, last, points, scale", [
    (0.076, 0.0, 1e3, 1e9, 7, 8.8), (0.6, 0.4, 8e5, 1e8, 4, 1.0), (3.0, 0.2, 1e6, 1e8, 5, 1e-9),
    (0.25, 30.0, 1e5, 1e9, 9, 1e9), (0.5, 1e4, 1e6, 1e9, 8, 1.0)])
def test_a_law_without_noise_is_recovered(alpha, c, first, last, points, scale):
    N = [int(n) for n in np.geomspace(first, last, points)]  # a list of ints, as users have it
    fit = fit_power_law(N, [scale * ((n / N[0]) ** -alpha + c) for n in N])
    assert fit["status"] == "identified" and fit["n_points"] == points
    assert fit["alpha"]["value"] == pytest.approx(alpha, rel=1e-5)
    assert fit["c"]["value"] == pytest.approx(c * scale, rel=1e-5, abs=1e-5 * scale)
    assert fit["a"]["value"] == pytest.approx(scale * N[0] ** alpha, rel=1e-4)
    assert fit["holdout"]["error"] == pytest.approx(0, abs=1e-5)
    json.dumps(fit, allow_nan=False)


def test_a_surface_without_noise_is_recovered():
    N, D, L, run = surface(sizes=6, budgets=4)
    fit = fit_parametric_loss(list(N), list(D), list(L), run_id=list(run), n_boot=2)
    for name, truth in (("alpha", 0.4), ("beta", 0.45), ("A", 40), ("B", 300), ("E", 0.35)):
        assert fit[name]["value"] == pytest.approx(truth, rel=1e-8)
    assert fit["status"] == "identified" and fit["n_points"] == 24
    N, D, L, run = surface(0.01, seed=3)  # with noise: no other start comes lower
    data, rng = [np.log(a) - np.log(a).mean() for a in (N, D, L)], np.random.default_rng(0)
    for _ in range(5):
        start = [*rng.uniform(-3, 0, 3), *np.log(rng.uniform(0.1, 1.5, 2))]
        found = optimize.minimize(study.huber_sum, start, (*data, np.ones_like(L)), "BFGS", jac=True)
        assert found.fun > (1 - 1e-9) * study.fit_surface(N, D, L, run).objective


@pytest.mark.parametrize("seeds", [[1] * 5, [3] * 5, [5, 3, 2, 1, 1]])
def test_the_interval_covers(seeds):
    rng, draws, inside = np.random.default_rng(0), 60, np.zeros(3)
    N = np.repeat(SIZES, seeds)
    for _ in range(draws):
        found = study.fit_curve(study.check_points(N, law(N) * np.exp(0.005 * rng.normal(size=len(N)))))
        spans = [found.interval(lambda p: p[..., 3]), found.interval(lambda p: np.exp(p[..., 2])),
                 found.predict(1e10)[:, 0]]
        inside += [lo <= truth <= hi for (_, lo, hi), truth in zip(spans, (0.4, 0.3, 0.3316979), strict=True)]
    assert (inside >= 0.85 * draws).all() and (inside < draws).any(), inside


def test_scale_and_order_change_nothing():
    L, order = law(SIZES) * noise(0.003, 5), [3, 0, 4, 1, 2]
    fit = fit_power_law(SIZES, L)
    assert fit_power_law(SIZES[order], L[order]) == fit
    scaled = fit_power_law(1000 * SIZES, L / np.log(2))
    for name, factor in (("alpha", 1), ("c", np.log(2))):
        ends = [factor * end for end in scaled[name].values()]
        assert ends == pytest.approx([*fit[name].values()], rel=1e-5)
    N, D, L, run = surface(0.003)
    order = np.random.default_rng(1).permutation(len(N))
    first = fit_parametric_loss(N, D, L, run_id=run, n_boot=5)
    assert fit_parametric_loss(N[order], D[order], L[order], run_id=run[order], n_boot=5) == first


@pytest.mark.parametrize("table, alpha, c, missed, last_step, ruler, status", [
    (GPT, (0.599, 0.435, 0.794), (0.4007, 0.384, 0.41), 0.0054, 0.50, -0.0086, "identified"),
    (LSTM, (0.275, 0.137, 0.420), (0.359, 0.193, 0.414), -0.0080, 0.22, -0.0035, "ridge")])
def test_the_published_table(table, alpha, c, missed, last_step, ruler, status):
    fit = fit_power_law(*table)
    assert [round(end, 3) for end in fit["alpha"].values()] == list(alpha)
    assert list(fit["c"].values()) == pytest.approx(c, abs=0.004)
    held = fit["holdout"]
    assert round(held["error"], 4) == missed and round(held["ruler_error"], 4) == ruler
    assert held["share_of_last_step"] == pytest.approx(last_step, abs=0.005)
    assert fit["status"] == status
    assert held["hit"] is False  # the interval of the one holds persistence, the other loses to the ruler

    def residuals(p):
        N, L = (np.array(column, float) for column in table)
        return np.log(p["a"] * (N / N[0]) ** -p["alpha"] + p["c"]) - np.log(L)
    p = lmfit.Parameters()  # an independent library's profile
    for name, start in (("alpha", 0.4), ("a", 0.2), ("c", 0.35)):
        p.add(name, start)
    minimizer = lmfit.Minimizer(residuals, p)
    ends = lmfit.conf_interval(minimizer, minimizer.minimize(), p_names=["alpha", "c"], sigmas=[0.95])
    for name, tolerance in (("alpha", 2e-3), ("c", 1e-2)):
        (_, lo), (_, value), (_, hi) = ends[name]
        assert list(fit[name].values()) == pytest.approx([value, lo, hi], rel=tolerance)


def test_runs_not_points_are_drawn_in_the_bootstrap():
    """Budgets of a run share its noise: an interval that takes them for independent is too narrow."""
    spread = np.zeros(2)
    for seed in range(3):
        N, D, L, run = surface(0.004, seed, sizes=8, own=0.1)
        for i, names in enumerate((run, np.arange(len(L)))):
            spread[i] += study.fit_surface(N, D, L, names, 20).others[:, 3].std()
    assert spread[0] > 1.2 * spread[1], spread


NO_LAWS = {
    "step": lambda x, rng: np.where(x < rng.uniform(0.2, 0.9), 2.0, 1.4),
    "log-linear": lambda x, rng: 2 - x,
    "concave": lambda x, rng: 2 - x**2,
    "exponential": lambda x, rng: 1 + np.exp(-(100 ** (x - rng.uniform(0, 0.8)))),
    "sigmoid": lambda x, rng: 2 - 1 / (1 + np.exp(-12 * (x - 0.5))),
    "random": lambda x, rng: np.exp(0.3 * rng.normal(size=len(x)))}


@pytest.mark.parametrize("kind", NO_LAWS)
def test_no_exponent_where_there_is_no_power_law(kind):
    for n, sd in ((4, 0), (6, 0.002), (12, 0.002)):
        rng, x = np.random.default_rng([n, int(sd * 1000)]), np.linspace(0, 1, n)
        L = NO_LAWS[kind](x, rng) * np.exp(sd * rng.normal(size=n))
        found = study.attempt(fit_power_law, 1e6 * 1000**x, L)
        assert found["status"] in ("refused", "not_identified"), (n, sd, found)


def test_seeds_tell_a_law_with_noise_from_one_that_misses():
    found = [fit_power_law(SIZES, law(SIZES) * noise(0.003, 5, seed))["status"] for seed in range(5)]
    assert found.count("identified") + found.count("ridge") >= 4
    L = law(SIZES)
    L[2] *= 1.02
    fit = fit_power_law(np.repeat(SIZES, 3), np.repeat(L, 3) * noise(0.0005, 15))
    assert fit["status"] == "not_identified" and "noise" in fit["reason"]
    assert fit["holdout"]["noise"] == pytest.approx(0.0005 / np.sqrt(3), rel=0.5)


@pytest.mark.parametrize("N, L", [
    (SIZES[:3], law(SIZES)[:3]), ([1e6, 1e6, 1e7, 1e8], [4, 4, 3, 2]), ([], []), (SIZES, [0.6, 0.5]),
    (SIZES, [0.6, 0.5, float("nan"), 0.45, 0.44]), (SIZES, [0.6, 0.5, None, 0.45, 0.44]),
    (SIZES, [0.6, 0.5, -0.1, 0.45, 0.44]), (SIZES, [0.6, 0.5, float("inf"), 0.45, 0.44]),
    ([0, 1, 2, 3], [4, 3, 2, 1]), (SIZES, law(SIZES)[::-1]), (SIZES, np.full(5, 0.5))])
def test_tables_that_are_no_table_are_refused_in_words(N, L):
    with pytest.raises(UserError, match=r"^[A-Za-z].{20,}"):
        fit_power_law(N, L)


def test_surfaces_that_are_none_are_refused_or_not_identified():
    N, D, L, run = surface()
    for bad in ((N[:9], D[:9], L[:9]), (N, np.full_like(D, 1e8), L), (N, N / 4, L), (N, D, L[::-1]),
                (N, D, np.full_like(L, np.nan)), (N, D, L[:-1])):
        with pytest.raises(UserError, match=r"^[A-Za-z].{20,}"):
            fit_parametric_loss(*bad)
    log_linear = 2 - 0.1 * np.log(N / 1e6) - 0.1 * np.log(D / 1e8)
    fit = fit_parametric_loss(N, D, log_linear * noise(0.002, 15), run_id=run, n_boot=10)
    assert fit["status"] == "not_identified"


def test_the_frontier_is_the_least_loss_of_every_budget():
    fit, budgets = study.fit_surface(*surface(), n_boot=2), np.array([1e13, 1e15, 1e18])
    found = study.compute_frontier(fit, budgets)
    for i, flops in enumerate(budgets):
        n = found["n"][0, i] * np.geomspace(0.1, 10, 200_001)
        loss = 0.35 + 40 * n**-0.4 + 300 * (flops / 6 / n) ** -0.45
        assert found["n"][0, i] == pytest.approx(n[loss.argmin()], rel=1e-3)
        assert found["loss"][0, i] == pytest.approx(loss.min(), rel=1e-5)
    assert 6 * found["n"][0] * found["d"][0] == pytest.approx(budgets)
    capped = study.compute_frontier(fit, 1e18, most_tokens=1e8)
    assert capped["d"][0] == pytest.approx(1e8) and capped["loss"][0] > found["loss"][0, -1]


def test_the_prediction_of_a_larger_model_holds_and_a_hit_needs_more_than_a_straight_line():
    N, hits = np.geomspace(1e5, 1e8, 7), {}
    for name, L, sd in (("law", law(N), 0.003), ("line", 2 - 0.1 * np.log(N / 1e5), 1e-4)):
        for seed in range(20):
            noisy = L * noise(sd, 7, seed)
            stated = study.state_prediction({"N": N[:-1], "L": noisy[:-1]}, N[-1])
            found = study.with_outcome(stated, noisy[-1:])
            hits.setdefault(name, []).append((stated["lo"] <= noisy[-1] <= stated["hi"], found["hit"]))
    assert np.sum(hits["law"], 0)[0] >= 17 and np.sum(hits["law"], 0)[1] >= 10, hits
    assert np.sum(hits["line"], 0)[1] <= 2, hits
    none = study.state_prediction({"N": N[:2], "L": L[:2]}, N[-1])
    assert none["predicted"] is None and "sizes" in none["reason"]
    assert study.with_outcome(none, L[-1:])["hit"] is None


def table(families):
    """Rows of scaling_results.json for {family: (N, D, L, run)}."""
    return [{"run": f"{family}_{i}", "family": family, "size": str(i), "seed": 1, "n_params": int(1.1 * n),
             "n_fit": int(n), "n_non_embedding": int(0.9 * n), "tokens": int(d),
             "unique_tokens": min(int(d), 50_000_000), "epochs": d / 5e7, "flops_per_token": int(6 * n),
             "flops": int(6 * n * d), "lr": 0.02, "val_loss": loss, "val_loss_se": 0.004, "tokens_per_s": 1e5,
             "main": bool(d == columns[1].max())}
            for family, columns in families.items() for n, d, loss, i in zip(*columns, strict=True)]


def run_fit(folder, rows, prediction=None):
    """The fit stage of a study with these runs; returns fits.json."""
    curve = {"tokens": [1, 2], "train_loss": [2.0, 1.0], "val_tokens": [2], "val_loss": [1.0]}
    study.write_json(folder / "scaling_results.json", {"study": "full", "corpus": "made up", "runs": rows})
    study.write_json(folder / "training_curves.json", {row["run"]: curve for row in rows})
    study.write_json(folder / "prediction.json", prediction or {})
    study.write_json(folder / "tokens" / "stats.json",
                     {"splits": {"val": {"chars": 900, "tunes": 100, "notes": 500}}})
    study.fit.__wrapped__(Cfg(SAVE_DIR=folder, DATA_ROOT=folder, BOOTSTRAP=4))
    return study.read_json(folder / "fits.json")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """(folder, fits.json) of a made-up study of two families: one has rising losses at hardly any sizes."""
    N, D, L, run = surface(0.001, seed=5)
    few = N[:9], D[:9], L[8::-1], run[:9]
    folder = tmp_path_factory.mktemp("fitted")
    gpt = {"n": int(N.max()), "predicted": L[-1] * 1.001, "lo": L[-1] * 0.99, "hi": L[-1] * 1.01,
           "ruler": 0.9 * L[-1], "persistence": 1.05 * L[-1], "noise": None, "reason": ""}
    return folder, run_fit(folder, table({"gpt": (N, D, L, run), "lstm": few}), {"gpt": gpt})


def test_fits_json_is_enough_to_refit_and_explains_itself(fitted):
    folder, fits = fitted
    rows = [row for row in fits["points"] if row["family"] == "gpt"]
    checklist = set("n_params n_fit n_non_embedding tokens unique_tokens epochs flops lr seed".split())
    N, L = (np.array([row[key] for row in rows if row["main"]], float) for key in ("n_fit", "val_loss"))
    again = optimize.least_squares(lambda p: np.log(p[0] * (N / N[0]) ** -p[1] + p[2]) - np.log(L),
                                   [0.2, 0.5, 0.4], xtol=1e-12).x
    gpt = fits["families"]["gpt"]
    assert [gpt["power_law"][key]["value"] for key in ("alpha", "c")] == pytest.approx(again[1:], rel=1e-4)
    assert gpt["prediction"]["hit"] is True and len(gpt["power_law"]["local_slopes"]) == 4
    assert "factor of 100" in gpt["verdict"] and "No law" in fits["families"]["lstm"]["verdict"]
    narrow = study.main_table([row for row in rows if row["n_fit"] > N.min()])
    assert "too narrow" in study.describe(study.attempt(fit_power_law, *narrow), rows[3:])
    told = {key for law in (gpt["power_law"], gpt["parametric"], gpt["prediction"]) for key in law} | set(gpt)
    letters = set("alpha beta a c A B E n d".split())
    assert told - letters <= set(re.findall(r"\w+", " ".join([*fits["method"], *fits["method"].values()])))
    lines = (folder / "scaling_points.csv").read_text().splitlines()
    assert len(lines) == len(fits["points"]) + 1 and checklist <= set(lines[0].split(","))
    for name in ("gpt_scaling", "lstm_scaling", "combined_scaling", "training_curves"):
        assert (folder / f"{name}.png").stat().st_size > 10_000


def test_every_pair_of_families_is_compared():
    sizes, laws = np.geomspace(1e6, 1e8, 5), {}
    for name, factor in (("gpt", 1), ("lstm", 1.25), ("gru", 1.1)):
        power = fit_power_law(sizes, factor * law(sizes) * noise(0.001, 5))
        laws[name] = {"power_law": power, "power_law_flops": study.Law(status="refused", reason="no runs")}
    families = {name: [{"n_fit": n, "flops": n} for n in sizes] for name in laws}
    pairs = study.compare_families(families, laws, bits_per_note=2.0)
    assert [pair["families"] for pair in pairs] == [["gpt", "lstm"], ["gpt", "gru"], ["lstm", "gru"]]
    part = pairs[0]["equal_parameters"]
    assert part["at"] == sizes.max() and part["lo"] < part["value"] < part["hi"]
    assert part["value"] == pytest.approx(0.8) and part["nats"]["value"] < 0
    assert part["bits_per_note"]["value"] == pytest.approx(2 * part["nats"]["value"])
    assert "no runs" in pairs[0]["equal_flops"]["reason"]


def test_a_budget_becomes_a_plan(fitted, capsys):
    where, budget = ["--SAVE_DIR", str(fitted[0]), "--BOOTSTRAP", "4"], 7200 * 6e8 * 1e5
    assert main(["--plan", "2h", *where]) == 0
    hours = capsys.readouterr().out
    assert main(["--plan", f"{budget}", *where]) == 0
    flops = capsys.readouterr().out
    rows = [re.search(r"^gpt, [^ ]+ +(\d.*)", text, re.M)[1].split() for text in (hours, flops)]
    assert rows[0] == rows[1]  # two hours at the rate measured are so many FLOPs
    n, d, epochs = float(rows[0][0]), float(rows[0][3]), float(rows[0][6])
    assert 6 * n * d == pytest.approx(budget, rel=0.02) and epochs <= 4
    assert re.search(r"^gpt, best so far ", hours, re.M)
    assert re.search(r"^lstm, 2h: no law", hours, re.M)
    assert main(["--plan", "1e12", *where]) == 0
    assert "would not beat" in capsys.readouterr().out


def test_a_plan_that_cannot_be_made_is_told(fitted, tmp_path, capsys):
    cases = [(fitted[0], budget, "takes 2h") for budget in ("soon", "0h", "-2h", "2w")]
    cases += [(fitted[0], "2", "did you mean 2h?"), (tmp_path, "2h", "fits.json")]
    for folder, budget, hint in cases:
        assert main([f"--plan={budget}", "--SAVE_DIR", str(folder)]) == 2
        assert hint in capsys.readouterr().err
    assert not (tmp_path / "fits.json").exists()
