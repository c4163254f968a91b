"""Laws: recovered where they hold, refused where they don't, with intervals that cover; what follows."""

import json
import re
from pathlib import Path

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


def surface(noise=0.0, seed=0, sizes=5, budgets=3, own=0.5):
    """(N, D, L, run) of L = .35 + 40 / N^.4 + 300 / D^.45; branches share all but `own` of the noise."""
    rng, run = np.random.default_rng(seed), np.repeat(np.arange(sizes), budgets)
    N, D = np.geomspace(1e6, 1e8, sizes)[run], np.tile(np.geomspace(2.5e7, 1e8, budgets), sizes)
    spread = noise * (np.sqrt(1 - own**2) * rng.normal(size=sizes)[run] + own * rng.normal(size=len(run)))
    return N, D, (0.35 + 40 * N**-0.4 + 300 * D**-0.45) * np.exp(spread), run


def covers(estimate, truth):
    return (estimate["lo"] is None or estimate["lo"] <= truth) and (
        estimate["hi"] is None or truth <= estimate["hi"]
    )


@pytest.mark.parametrize(
    "alpha, c, first, last, points, scale",
    [
        (0.3, 0.5, 1e3, 1e12, 10, 1.0),
        (0.076, 0.0, 1e3, 1e9, 7, 8.8),
        (0.6, 0.4, 8e5, 1e8, 4, 1.0),
        (3.0, 0.2, 1e6, 1e8, 5, 1e-9),
        (0.25, 30.0, 1e5, 1e9, 200, 1e9),
        (1.0, 0.0, 100, 1e4, 5, 1.0),
        (0.5, 1e4, 1e6, 1e9, 8, 1.0),
    ],
)
def test_a_law_without_noise_is_recovered(alpha, c, first, last, points, scale):
    N = [int(n) for n in np.geomspace(first, last, points)]  # a list of ints, as users have it
    fit = fit_power_law(N, [scale * ((n / N[0]) ** -alpha + c) for n in N])
    assert fit["status"] == "identified"
    assert fit["alpha"]["value"] == pytest.approx(alpha, rel=1e-5)
    assert fit["c"]["value"] == pytest.approx(c * scale, rel=1e-5, abs=1e-5 * scale)
    assert fit["a"]["value"] == pytest.approx(scale * N[0] ** alpha, rel=1e-4)
    assert fit["n_points"] == points and fit["holdout"]["error"] == pytest.approx(0, abs=1e-5)
    json.dumps(fit, allow_nan=False)


def test_a_surface_without_noise_is_recovered():
    N, D, L, run = surface(sizes=6, budgets=4)
    fit = fit_parametric_loss(list(N), list(D), list(L), run_id=list(run), n_boot=20)
    for name, truth in (("alpha", 0.4), ("beta", 0.45), ("A", 40), ("B", 300), ("E", 0.35)):
        assert fit[name]["value"] == pytest.approx(truth, rel=1e-5)
    assert fit["status"] == "identified" and fit["n_points"] == 24
    assert set(fit) >= {"reason", "sigma_log", "holdout", "loo_alpha", "objective", "baselines"}


@pytest.mark.parametrize(
    "noise, given", [(0.002, "nothing"), (0.005, "nothing"), (0.005, "seed_sd"), (0.005, "seeds")]
)
def test_the_interval_covers(noise, given):
    rng, draws, inside = np.random.default_rng(0), 200, {"alpha": 0, "c": 0}
    N = np.repeat(SIZES, 3 if given == "seeds" else 1)
    L = law(N, 0.4, 0.6)
    for _ in range(draws):
        points = study.check_points(
            N, L * np.exp(noise * rng.normal(size=len(N))), noise if given == "seed_sd" else None
        )
        fit = study.best_law(points)
        for name, truth in (("alpha", 0.4), ("c", 0.3)):
            lo, hi = study.profile_interval(points, fit, name)
            inside[name] += covers({"lo": lo, "hi": hi}, truth)
    assert all(0.90 <= n / draws <= 0.98 for n in inside.values()), inside


def test_scale_and_order_change_nothing():
    rng = np.random.default_rng(1)
    L = law(SIZES) * np.exp(0.003 * rng.normal(size=5))
    fit, order = fit_power_law(SIZES, L), rng.permutation(5)
    assert fit_power_law(SIZES[order], L[order]) == fit
    scaled = fit_power_law(1000 * SIZES, L / np.log(2))
    assert scaled["status"] == fit["status"]
    for end in ("value", "lo", "hi"):
        assert scaled["alpha"][end] == pytest.approx(fit["alpha"][end], rel=1e-5)
        assert scaled["c"][end] == pytest.approx(fit["c"][end] / np.log(2), rel=1e-5)
    N, D, L, run = surface(0.003)
    order = rng.permutation(len(N))
    first = fit_parametric_loss(N, D, L, run_id=run, n_boot=20)
    second = fit_parametric_loss(N[order], D[order], L[order], run_id=run[order], n_boot=20)
    assert all(first[name] == second[name] for name in ("alpha", "beta", "A", "B", "E", "holdout"))


@pytest.mark.parametrize(
    "table, alpha, c, missed",
    [
        (GPT, (0.599, 0.435, 0.794), (0.4007, 0.384, 0.409), 0.0054),
        (LSTM, (0.275, 0.137, 0.420), (0.359, 0.193, 0.414), -0.0080),
    ],
)
def test_the_published_table(table, alpha, c, missed):
    fit = fit_power_law(*table)
    assert [round(fit["alpha"][end], 3) for end in ("value", "lo", "hi")] == list(alpha)
    assert [fit["c"][end] for end in ("value", "lo", "hi")] == pytest.approx(c, abs=0.004)
    assert round(fit["holdout"]["error"], 4) == missed
    assert fit["status"] == ("identified" if table is GPT else "ridge")


def log_residuals(p, N, L):
    return np.log(p["a"] * (N / N[0]) ** -p["alpha"] + p["c"]) - np.log(L)


@pytest.mark.parametrize("table", [GPT, LSTM])
def test_lmfit_finds_the_same_intervals(table):
    N, L = (np.array(column, float) for column in table)
    p = lmfit.Parameters()
    p.add("alpha", 0.4)
    p.add("a", 0.2)
    p.add("c", 0.35)
    minimizer = lmfit.Minimizer(log_residuals, p, fcn_args=(N, L))
    result = minimizer.minimize()
    ends = lmfit.conf_interval(minimizer, result, p_names=["alpha", "c"], sigmas=[0.95])
    fit = fit_power_law(N, L)
    for name in ("alpha", "c"):
        (_, lo), (_, value), (_, hi) = ends[name]
        assert [fit[name][end] for end in ("lo", "value", "hi")] == pytest.approx([lo, value, hi], rel=2e-3)


def test_the_offset_as_smallest_loss_is_a_trap():
    N = np.geomspace(8e5, 1e8, 6)
    L = law(N, 0.27)
    excess = L[:-1] - L.min()  # what c = min(y) leaves
    assert -np.polyfit(np.log(N[:-1]), np.log(excess), 1)[0] > 2 * 0.27
    assert fit_power_law(N, L)["alpha"]["value"] == pytest.approx(0.27, rel=1e-5)


def test_the_mean_of_a_huber_loss_is_a_trap():
    N, D, L, run = surface(0.001, sizes=6, budgets=4)
    x, y, z = np.log(N), np.log(D), np.log(L)

    def mean_huber(p):
        r = np.abs(z - np.logaddexp.reduce([p[0] - p[3] * x, p[1] - p[4] * y, np.full_like(x, p[2])]))
        return np.where(r < 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).mean()

    stopped = optimize.minimize(mean_huber, [5, 5, -1, 0.2, 0.2], method="L-BFGS-B").x
    fit = fit_parametric_loss(N, D, L, run_id=run, n_boot=20)
    best = [*np.log([fit[name]["value"] for name in "ABE"]), fit["alpha"]["value"], fit["beta"]["value"]]
    assert mean_huber(best) < mean_huber(stopped) / 1.5
    assert abs(stopped[3] - 0.4) > 0.1 and fit["alpha"]["value"] == pytest.approx(0.4, abs=0.05)


def test_the_optimum_does_not_depend_on_the_start():
    N, D, L, _ = surface(0.01, seed=3)
    data = [np.log(a) - np.log(a).mean() for a in (N, D, L)]
    best = study.fit_and_draws(N, D, L, np.arange(len(L)), 1e-3)[0]
    rng = np.random.default_rng(0)
    for _ in range(20):
        start = [*rng.uniform(-3, 0, 3), *rng.uniform(0.1, 1.5, 2)]
        found = optimize.minimize(
            study.huber_sum, start, (*data, np.ones_like(L), 1e-3), "BFGS", jac=True
        ).fun
        assert found > best - 1e-9 * best


def test_runs_not_points_are_drawn_in_the_bootstrap():
    """Branches of a run share its noise: an interval that takes them for independent covers too seldom."""
    inside = {"runs": 0, "points": 0}
    for seed in range(16):
        N, D, L, run = surface(0.004, seed, sizes=8, own=0.1)
        for kind, names in (("runs", run), ("points", np.arange(len(L)))):
            lo, hi = np.quantile(
                study.fit_and_draws(N, D, L, names, 1e-3, 30, starts=1)[2][:, 3], [0.025, 0.975]
            )
            inside[kind] += lo <= 0.4 <= hi
    assert inside["runs"] >= 13 and inside["runs"] > inside["points"] + 2, inside


def no_law(kind, x, rng):
    """Losses at relative log sizes x in 0..1 that follow no power law."""
    return {
        "rising": 1 + 0.3 * x,
        "flat": np.full_like(x, 2.0),
        "flat with noise": 2 * np.exp(0.004 * rng.normal(size=len(x))),
        "step": np.where(x < rng.uniform(0.2, 0.9), 2.0, 1.4),
        "two steps": 2 - 0.3 * np.floor(2.999 * x),
        "log-linear": 2 - x,
        "concave": 2 - x**2,
        "U-shape": 1 + 2 * (x - 0.6) ** 2,
        "exponential": 1 + np.exp(-(100 ** (x - rng.uniform(0, 0.8)))),
        "sigmoid": 2 - 1 / (1 + np.exp(-12 * (x - 0.5))),
        "random": np.exp(0.3 * rng.normal(size=len(x))),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "rising",
        "flat",
        "flat with noise",
        "step",
        "two steps",
        "log-linear",
        "concave",
        "U-shape",
        "exponential",
        "sigmoid",
        "random",
    ],
)
def test_no_exponent_where_there_is_no_power_law(kind):
    given = 0
    for n in (4, 5, 6, 9, 20):
        for noise in (0, 0.002):
            rng = np.random.default_rng([n, int(noise * 1000)])
            x = np.linspace(0, 1, n)
            L = no_law(kind, x, rng) * np.exp(noise * rng.normal(size=n))
            try:
                given += fit_power_law(1e6 * 1000**x, L)["status"] in ("identified", "ridge")
            except UserError:
                pass
    assert given == 0


def test_a_law_with_noise_is_given_its_exponent():
    statuses = [
        fit_power_law(SIZES, law(SIZES) * np.exp(0.003 * np.random.default_rng(seed).normal(size=5)))[
            "status"
        ]
        for seed in range(20)
    ]
    assert statuses.count("identified") + statuses.count("ridge") >= 18


def test_seeds_that_agree_better_than_the_law_are_told():
    L = law(SIZES)
    L[2] *= 1.02
    fit = fit_power_law(SIZES, L, seed_sd=0.001)
    assert fit["status"] == "not_identified" and "noise" in fit["reason"]
    seeds = np.repeat(L, 3) * np.exp(0.0005 * np.random.default_rng(0).normal(size=15))
    assert fit_power_law(np.repeat(SIZES, 3), seeds)["status"] == "not_identified"


@pytest.mark.parametrize(
    "N, L",
    [
        (SIZES[:3], law(SIZES)[:3]),
        ([1e6, 1e6, 1e7, 1e8], [4, 4, 3, 2]),
        (SIZES, [0.6, 0.5, float("nan"), 0.45, 0.44]),
        (SIZES, [0.6, 0.5, None, 0.45, 0.44]),
        (SIZES, [0.6, 0.5, -0.1, 0.45, 0.44]),
        ([0, 1, 2, 3], [4, 3, 2, 1]),
        (SIZES, [0.6, 0.5]),
        (SIZES, law(SIZES)[::-1]),
        ([], []),
        (SIZES, np.full(5, 0.5)),
        (SIZES, [0.6, 0.5, float("inf"), 0.45, 0.44]),
    ],
)
def test_tables_that_are_no_table_are_refused_in_words(N, L):
    with pytest.raises(UserError, match=r"^[A-Za-z].{20,}"):
        fit_power_law(N, L)


def test_surfaces_that_are_none_are_refused_or_not_identified():
    N, D, L, run = surface()
    for bad in (
        (N[:9], D[:9], L[:9]),
        (N, np.full_like(D, 1e8), L),
        (N, N / 4, L),
        (N, D, L[::-1]),
        (N, D, np.full_like(L, np.nan)),
        (N, D, L[:-1]),
    ):
        with pytest.raises(UserError, match=r"^[A-Za-z].{20,}"):
            fit_parametric_loss(*bad)
    u, v = np.log(N / 1e6), np.log(D / 1e8)
    for flat in (2 - 0.1 * u - 0.1 * v, 2 - 0.1 * u + 1e-9 * D / D.max(), np.exp(-0.1 * u - 0.1 * v)):
        noise = np.exp(0.002 * np.random.default_rng(0).normal(size=len(L)))
        try:
            assert (
                fit_parametric_loss(N, D, flat * noise, run_id=run, n_boot=40)["status"] == "not_identified"
            )
        except UserError:
            pass


def test_the_frontier_is_the_least_loss_of_every_budget():
    N, D, L, run = surface()
    fit = fit_parametric_loss(N, D, L, run_id=run, n_boot=10)
    for row in study.compute_frontier(fit, [1e13, 1e15, 1e18]):
        n = row["n"] * np.geomspace(0.1, 10, 200_001)
        loss = study.parametric_loss(
            [np.log(40), np.log(300), np.log(0.35), 0.4, 0.45], n, row["flops"] / 6 / n
        )
        assert row["n"] == pytest.approx(n[loss.argmin()], rel=1e-3)
        assert row["loss"] == pytest.approx(loss.min(), rel=1e-5) and 6 * row["n"] * row[
            "d"
        ] == pytest.approx(row["flops"])
        assert row["n_lo"] <= row["n_hi"] and row["loss_lo"] <= row["loss_hi"]


def test_repeated_tokens_are_worth_less():
    assert list(study.effective_tokens([50, 100], [50, 100])) == [50, 100]
    assert study.effective_tokens(5e9, 1e9) == pytest.approx(1e9 + 15.39e9 * (1 - np.exp(-4 / 15.39)))
    assert study.effective_tokens(1e15, 1e9) == pytest.approx(16.39e9)


def test_one_untuned_point_makes_the_difference_of_two_families():
    compared = study.compare_families(
        *(
            [
                {"n_fit": n, "flops": 1e10 * n, "val_loss": loss, "main": True}
                for n, loss in zip(*table, strict=True)
            ]
            for table in (GPT, LSTM)
        )
    )
    whole, rest = compared["shared_alpha"], compared["shared_alpha_without_smallest"]
    assert whole["each"] == pytest.approx([0.599, 0.275], abs=1e-3) and whole["p"] < 0.05
    assert rest["each"] == pytest.approx([0.389, 0.377], abs=1e-3) and rest["p"] > 0.5
    ratio = compared["equal_parameters"]
    assert ratio["at"] == 96572769 and ratio["lo"] < ratio["value"] < ratio["hi"] < 1
    assert compared["crossover"]["value"] < 8e5 and "extrapolated" in compared["crossover"]["reason"]


def test_the_crossover_is_found_with_its_interval():
    first, second = 4 * SIZES**-0.2, 4 * 1e7**0.1 * SIZES**-0.3  # equal at ten million
    noise = np.exp(0.0005 * np.random.default_rng(0).normal(size=(2, 5)))
    found = study.crossover((SIZES, first), (SIZES, second))
    assert [found[key] for key in ("lo", "value", "hi")] == pytest.approx([1e7] * 3, rel=5e-3) and not found[
        "reason"
    ]
    wide = study.crossover((SIZES, first * noise[0]), (SIZES, second * noise[1]))
    assert wide["lo"] < 1e7 < wide["hi"] and wide["hi"] / wide["lo"] > 1.01


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The folder of a made-up study that went through the fit stage: one family has a law."""
    folder, rows, curves = tmp_path_factory.mktemp("fitted"), [], {}
    for family in ("gpt", "lstm"):
        N, D, L, run = surface(0.001, seed=5)
        L = L if family == "gpt" else 2 - 0.05 * np.log(N / 1e6) - 0.01 * np.log(D / 2.5e7)
        for n, d, loss, i in zip(N, D, L, run, strict=True):
            rows.append(
                {
                    "run": f"{family}_{i}",
                    "family": family,
                    "size": str(i),
                    "seed": 1,
                    "n_params": int(1.1 * n),
                    "n_fit": int(n),
                    "n_non_embedding": int(0.9 * n),
                    "tokens": int(d),
                    "unique_tokens": min(int(d), 50_000_000),
                    "epochs": d / 5e7,
                    "flops_per_token": int(6 * n),
                    "flops": int(6 * n * d),
                    "lr": 0.02,
                    "val_loss": loss,
                    "val_loss_se": 0.004,
                    "tokens_per_s": 1e5,
                    "main": d == D.max(),
                }
            )
            curves[f"{family}_{i}"] = {
                "tokens": [1, 2],
                "train_loss": [2.0, 1.0],
                "val_tokens": [2],
                "val_loss": [loss],
            }
    study.write_json(
        folder / "scaling_results.json",
        {"study": "full", "corpus": "made up", "device": "none", "runs": rows},
    )
    study.write_json(folder / "training_curves.json", curves)
    study.write_json(
        folder / "prediction.json",
        {
            "gpt": {
                "n": max(row["n_fit"] for row in rows if row["family"] == "gpt"),
                "predicted": 0.45,
                "lo": 0.44,
                "hi": 0.46,
                "reason": "",
            }
        },
    )
    study.fit.__wrapped__(Cfg(SAVE_DIR=folder, BOOTSTRAP=12))
    return folder


def test_fits_json_is_enough_to_refit(fitted):
    fits = study.read_json(fitted / "fits.json")
    rows = [row for row in fits["points"] if row["family"] == "gpt"]
    checklist = (
        "n_params n_fit n_non_embedding tokens unique_tokens epochs flops lr seed val_loss val_loss_se"
    )
    assert set(checklist.split()) <= set(rows[0])
    N, L = (np.array([row[key] for row in rows if row["main"]], float) for key in ("n_fit", "val_loss"))
    again = optimize.least_squares(
        lambda p: np.log(p[0] * (N / N[0]) ** -p[1] + p[2]) - np.log(L), [0.2, 0.5, 0.4], xtol=1e-12
    ).x
    law = fits["families"]["gpt"]["power_law"]
    assert [law["alpha"]["value"], law["c"]["value"]] == pytest.approx(again[1:], rel=1e-4)
    assert law["a"]["value"] == pytest.approx(again[0] * N[0] ** again[1], rel=1e-3)
    assert fits["families"]["gpt"]["prediction"]["hit"] is True
    assert (
        fits["families"]["gpt"]["parametric_effective"]["status"] != "refused"
    )  # epochs beyond one are told
    assert "factor of 100" in fits["families"]["gpt"]["verdict"]
    narrow = [row for row in rows if row["n_fit"] > N.min()]
    assert "too narrow" in study.describe(study.attempt(fit_power_law, *study.main_table(narrow)), narrow)
    lines = (fitted / "scaling_points.csv").read_text().splitlines()
    assert len(lines) == len(fits["points"]) + 1 and set(checklist.split()) <= set(lines[0].split(","))
    assert "no exponent" in fits["families"]["lstm"]["verdict"]
    assert all(
        (fitted / f"{name}.png").stat().st_size > 10_000
        for name in ("gpt_scaling", "lstm_scaling", "combined_scaling", "training_curves")
    )


def test_a_budget_becomes_a_plan(fitted, capsys):
    assert main(["--plan", "2h", "--SAVE_DIR", str(fitted), "--BOOTSTRAP", "12"]) == 0
    hours = capsys.readouterr().out
    assert main(["--plan", f"{7200 * 6e8 * 1e5}", "--SAVE_DIR", str(fitted), "--BOOTSTRAP", "12"]) == 0
    flops = capsys.readouterr().out
    rows = [
        line.split() for text in (hours, flops) for line in text.splitlines() if re.match(r"gpt +\d", line)
    ]
    assert len(rows) == 2 and rows[0] == rows[1]  # two hours at the rate measured are so many FLOPs
    n, d = float(rows[0][1]), float(rows[0][4])
    assert 6 * n * d == pytest.approx(7200 * 6e8 * 1e5, rel=0.02)
    assert "Extrapolated" in hours and "lstm: L(N, D) is" in hours and "No plan" in hours


@pytest.mark.parametrize("budget", ["soon", "0h", "-2h", "2w"])
def test_a_budget_that_is_none_is_told(fitted, budget, capsys):
    assert main([f"--plan={budget}", "--SAVE_DIR", str(fitted)]) == 2
    assert "2h" in capsys.readouterr().err


def test_a_plan_needs_fits(tmp_path, capsys):
    assert main(["--plan", "2h", "--SAVE_DIR", str(tmp_path)]) == 2
    assert "fits.json" in capsys.readouterr().err and not Path(tmp_path, "fits.json").exists()


def test_the_prediction_of_a_larger_model_holds():
    inside = 0
    for seed in range(100):
        noise = np.exp(0.003 * np.random.default_rng(seed).normal(size=7))
        N, L = np.geomspace(1e5, 1e8, 7), law(np.geomspace(1e5, 1e8, 7)) * noise
        stated = study.state_prediction({"N": N[:-1], "L": L[:-1]}, N[-1])
        inside += stated["lo"] <= L[-1] <= stated["hi"]
    assert 88 <= inside <= 100
    none = study.state_prediction({"N": N[:2], "L": L[:2]}, N[-1])
    assert none["predicted"] is None and "sizes" in none["reason"]
