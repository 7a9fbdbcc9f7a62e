"""Which way of choosing blocks is best? SASRec with full attention and with each selector of Blossom, on long histories of MovieLens-1M.

    python -m benchmarks.blossom_selectors --data ../shared/data/ml-1m.zip        # runs that start within seven minutes, on one core

Users with at least `--least` ratings, drawn by a fixed seed; the newest `--window` events of each. The last 20 of these are the test: each of them
is ranked against all items that the user has not rated before it, from the state after the events before it (they are read, not learnt from). All
others are learnt from, with the full softmax. Each run takes the same number of epochs; nothing is tuned on the test. Small and short: for comparing,
not a figure to quote. Runs already in the file are not repeated.
"""

import time
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor

from benchmarks.ranker_latency import hardware
from longtrail.config import SASRecSettings
from longtrail.files import read_json, write_json
from longtrail.losses.softmax import softmax_loss
from longtrail.models.contracts import History, Sizes
from longtrail.models.encoders.sasrec import SASRec

TESTED = 20  # last events of each user
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full", "positions": "learned"},
    "full_rotary": {"kind": "full", "positions": "rotary"},
    "frozen": {"kind": "blossom", "selector": "frozen"},
    "straight_through": {"kind": "blossom", "selector": "straight_through"},
    "compressed": {"kind": "blossom", "selector": "compressed"},
}


def read_histories(path: Path, users: int, least: int, window: int) -> tuple[Tensor, Tensor, int]:
    """int64 [U, window] dense item ids, right-padded, oldest first; their lengths; and the number of items."""
    with zipfile.ZipFile(path) as archive:
        text = archive.read("ml-1m/ratings.dat").replace(b"::", b",")
    ratings = pd.read_csv(BytesIO(text), names=["user", "item", "rating", "time"]).sort_values(["user", "time"], kind="stable")
    ratings["item"] = ratings["item"].astype("category").cat.codes + 1
    counts = ratings["user"].value_counts().sort_index()
    drawn = np.random.default_rng(0).permutation(counts.index[counts >= least])[:users]
    items_UL = np.zeros((len(drawn), window), dtype=np.int64)
    lengths_U = np.zeros(len(drawn), dtype=np.int64)
    for row, (_, items) in enumerate(ratings[ratings["user"].isin(drawn)].groupby("user")["item"]):
        newest = items.to_numpy()[-window:]
        items_UL[row, : len(newest)], lengths_U[row] = newest, len(newest)
    return torch.from_numpy(items_UL), torch.from_numpy(lengths_U), int(ratings["item"].max())


def make_history(items_BL: Tensor, lengths_B: Tensor) -> History:
    """The newest event of each is a target only, so it is cut off."""
    longest = int(lengths_B.max()) - 1
    items_BL = items_BL[:, :longest]
    ones = torch.ones_like(items_BL)
    return History(items_BL=items_BL, categories_BL=ones, actions_BL=ones, times_BL=ones, lengths_B=lengths_B - 1)


def prefixes(model: SASRec, items_BL: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States [B, L, D] before each event, the events [B, L], and how far each stands from the end, [B, L]: 0 is the last, negative is padding."""
    states_BLD = model.prefix_states(make_history(items_BL, lengths_B))
    L = states_BLD.shape[1]
    return states_BLD, items_BL[:, :L], lengths_B.unsqueeze(1) - 1 - torch.arange(L)


@torch.no_grad()
def judge(model: SASRec, items_UL: Tensor, lengths_U: Tensor) -> dict[str, float]:
    """NDCG@10 and recall@10 among unseen items, and the mean log loss over all items, of the last events."""
    model.eval()
    ndcg, hits, losses = [], [], []
    for rows in torch.arange(len(items_UL)).split(16):
        states_BLD, targets_BL, left_BL = prefixes(model, items_UL[rows], lengths_U[rows])
        tested_BL = (left_BL >= 0) & (left_BL < TESTED)
        scores_TN = states_BLD[tested_BL] @ model.item_vectors().T
        targets_T1 = targets_BL[tested_BL].unsqueeze(1)
        scores_TN[:, 0] = -torch.inf
        losses.append(torch.nn.functional.cross_entropy(scores_TN, targets_T1.squeeze(1), reduction="none"))
        own_T1 = scores_TN.gather(1, targets_T1)
        user_T, place_T = tested_BL.nonzero(as_tuple=True)
        seen_TL = items_UL[rows][user_T].masked_fill(torch.arange(items_UL.shape[1]) >= place_T.unsqueeze(1), 0)
        rank_T = (scores_TN.scatter(1, seen_TL, -torch.inf) > own_T1).sum(1)
        ndcg.append(torch.where(rank_T < 10, 1 / (rank_T + 2.0).log2(), 0.0))
        hits.append((rank_T < 10).float())
    return {"ndcg_10": float(torch.cat(ndcg).mean()), "recall_10": float(torch.cat(hits).mean()), "log_loss": float(torch.cat(losses).mean())}


def run(variant: str, seed: int, epochs: int, data: tuple[Tensor, Tensor, int]) -> dict[str, Any]:
    """Train and judge one model; the figures after each third of the epochs."""
    items_UL, lengths_U, items = data
    torch.manual_seed(seed)
    settings = SASRecSettings.model_validate(
        {"width": 32, "blocks": 1, "heads": 2, "dropout": 0.1, "max_history": items_UL.shape[1], "attention": VARIANTS[variant]}
    )
    model = SASRec(settings, Sizes(items=items, categories=1, actions=1))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3, weight_decay=0.0)
    order, curve, start = torch.Generator().manual_seed(seed), [], time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in torch.randperm(len(items_UL), generator=order).split(4):
            states_BLD, targets_BL, left_BL = prefixes(model, items_UL[rows], lengths_U[rows])
            learnt_BL = left_BL >= TESTED
            loss = softmax_loss(states_BLD[learnt_BL], model.item_vectors(), targets_BL[learnt_BL])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if epoch % max(1, epochs // 3) == 0:
            curve.append({"epoch": epoch, "seconds": time.perf_counter() - start, **judge(model, items_UL, lengths_U)})
    return {"variant": variant, "seed": seed, "curve": curve}


def show(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, of the last figures."""
    lines = ["| attention | seeds | NDCG@10 | recall@10 | log loss | seconds |", "|---|---|---|---|---|---|"]
    for variant in VARIANTS:
        last = [r["curve"][-1] for r in runs if r["variant"] == variant]
        if last:
            figures = ([row[name] for row in last] for name in ("ndcg_10", "recall_10", "log_loss"))
            means = [f"{np.mean(x):.4f} ± {np.std(x, ddof=min(1, len(x) - 1)):.4f}" for x in figures]
            lines.append(f"| {variant} | {len(last)} | {' | '.join(means)} | {np.mean([row['seconds'] for row in last]):.0f} |")
    return "\n".join(lines)


def main(
    data: Annotated[Path, typer.Option(help="ml-1m.zip")] = Path("../shared/data/ml-1m.zip"),
    users: Annotated[int, typer.Option(help="users drawn")] = 300,
    least: Annotated[int, typer.Option(help="fewest ratings of a user")] = 300,
    window: Annotated[int, typer.Option(help="newest events read")] = 512,
    epochs: Annotated[int, typer.Option(help="passes over the users")] = 12,
    seeds: Annotated[int, typer.Option(help="runs of each variant")] = 3,
    seconds: Annotated[float, typer.Option(help="start no run after this")] = 420.0,
    out: Annotated[Path, typer.Option(help="where the figures are kept")] = Path("build/benchmarks/blossom_selectors.json"),
) -> None:
    """Compare the selectors."""
    torch.set_num_threads(1)
    sequences = read_histories(data, users, least, window)
    runs = read_json(out)["runs"] if out.exists() else []
    start = time.perf_counter()
    for seed in range(seeds):
        for variant in VARIANTS:
            if time.perf_counter() - start < seconds and not any((r["variant"], r["seed"]) == (variant, seed) for r in runs):
                runs.append(run(variant, seed, epochs, sequences))
                write_json(out, {"runs": runs, "hardware": hardware()})
                print(variant, seed, runs[-1]["curve"], flush=True)
    print(show(runs))


if __name__ == "__main__":
    typer.run(main)
