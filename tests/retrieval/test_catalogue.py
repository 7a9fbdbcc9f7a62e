"""Items added and retired online, compaction, files; and readers in threads while all that happens."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from longtrail.config import DenseItemsSettings, RecJPQItemsSettings, RetrievalSettings, SASRecSettings
from longtrail.errors import ModelError
from longtrail.files import read_json, write_json
from longtrail.models.contracts import Sizes
from longtrail.models.encoders.sasrec import SASRec
from longtrail.models.items.recjpq import RecJPQItems
from longtrail.retrieval.dense import DenseIndex
from longtrail.retrieval.exact import load_index, write_index
from longtrail.retrieval.index import Exclusion, Filter
from longtrail.retrieval.pq import PQIndex
from longtrail.retrieval.prune import Pruning
from longtrail.retrieval.storage import CARD, TENSORS, open_index, save_index
from tests.retrieval.worlds import catalogue, exclusions, users, vectors

PRUNED = Pruning(least_blocks=1, trials=(), longest_pause=0)


@pytest.mark.parametrize("pruning", [None, PRUNED], ids=["exhaustive", "pruned"])
@pytest.mark.parametrize("seed", range(4))
def test_a_changing_catalogue_equals_a_dense_one_made_anew(pruning: Pruning | None, seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    codes_NM, centroids = catalogue(rng, int(rng.integers(1, 1200)), 3, 20, ["random", "few values"][seed % 2])
    index, gone = PQIndex(codes_NM, centroids, pruning=pruning), np.zeros(0, np.int64)
    for step in range(8):
        if step % 4 == 3:
            index.compact()
        elif step % 2:
            retired = rng.integers(1, index.items + 1, size=int(rng.integers(0, index.items + 1)))
            index.retire(retired)
            gone = np.union1d(gone, retired)
        else:
            fresh = torch.from_numpy(rng.integers(0, 20, size=(int(rng.integers(0, 5000)), 3), dtype=np.uint8))
            ids = index.add(fresh)
            assert len(ids) == len(fresh) and np.array_equal(ids, len(codes_NM) + np.arange(len(fresh)))
            codes_NM = torch.cat([codes_NM, fresh])
        if step == 6:
            save_index(tmp_path / "index", index)
            index = open_index(tmp_path / "index")
            index.pruning = pruning
        assert index.items == len(codes_NM) - 1
        user_BD, targets = users(rng, 4, index.width), torch.from_numpy(rng.integers(0, index.items + 1, size=4))
        exclude = exclusions(rng, 4, index.items)
        stocked = rng.random(index.items + 1 - step) < 0.8  # shorter than the catalogue, too
        alive = np.zeros(index.items + 1, bool)
        alive[: len(stocked)] = stocked
        alive[gone] = False
        dense = DenseIndex(vectors(codes_NM, centroids))
        for k in (1, 20, 2000):
            found = index.topk_and_ranks(user_BD, targets, k, exclude=exclude, allowed=Filter(stocked))
            for a, b in zip(found, dense.topk_and_ranks(user_BD, targets, k, exclude=exclude, allowed=Filter(alive)), strict=True):
                assert torch.equal(a, b), (step, k)


def test_what_cannot_be_changed_is_refused() -> None:
    codes_NM, centroids = catalogue(np.random.default_rng(0), 10, 2, 8, "random")
    index = PQIndex(codes_NM, centroids)
    with pytest.raises(ModelError, match="item 11 is not there; expected ids from 1 to 10"):
        index.retire(np.array([3, 11]))
    assert (index.topk(torch.ones(1, 4), 10)[0] == 3).any()  # nothing of the change was made
    with pytest.raises(ModelError, match="codes run to 9"):
        index.add(torch.full((1, 2), 9, dtype=torch.uint8))
    with pytest.raises(ModelError, match="expected uint8"):
        index.add(torch.zeros(1, 3, dtype=torch.uint8))


def test_readers_in_threads_see_whole_changes_only() -> None:
    """Each change adds 100 items of one new best score and retires those of the change before: a list of 100 is always one change's."""
    rng = np.random.default_rng(0)
    centroids = torch.arange(256, dtype=torch.float32).reshape(1, 256, 1)
    index = PQIndex(torch.from_numpy(rng.integers(0, 10, size=(3000, 1), dtype=np.uint8)), centroids)
    index.retire(np.arange(1, 3000))
    newest = index.add(torch.full((100, 1), 10, dtype=torch.uint8))
    wrong: list[object] = []
    stop = threading.Event()

    def read() -> None:
        last = 0.0
        while not stop.is_set():
            _, scores = index.topk(torch.ones(1, 1), 100)
            values = set(scores[0].tolist())
            # A change is two steps, add and retire, so at a moment two changes' items are there; the best 100 are the newer's.
            if len(values) != 1 or values.pop() < last:
                wrong.append(scores)
            last = float(scores[0, 0])

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for code in range(11, 250):
        older, newest = newest, index.add(torch.full((100, 1), code, dtype=torch.uint8))
        index.retire(older)
        if code % 40 == 0:
            index.compact()
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    ids, scores = index.topk(torch.ones(1, 1), 101)
    assert ids[0, :100].tolist() == newest.tolist() and scores[0, 100] == -torch.inf


@pytest.mark.parametrize("shared", [False, True], ids=["concat", "sum"])
@pytest.mark.parametrize("pruning", [None, PRUNED], ids=["pqtopk", "recjpq_prune"])
def test_an_opened_index_answers_as_the_saved_one(pruning: Pruning | None, shared: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    codes_NM, centroids = catalogue(rng, 2000, 4, 50, "random")
    saved = PQIndex(codes_NM, centroids, shared=shared, pruning=pruning)
    save_index(tmp_path / "index", saved)
    opened = open_index(tmp_path / "index").warm_up()
    assert opened.kind == saved.kind and opened.items == 2000 and opened.width == saved.width == (2 if shared else 8)
    user_BD = users(rng, 6, saved.width)
    exclude = Exclusion(np.arange(7), np.arange(6))
    for a, b in zip(saved.topk(user_BD, 50, exclude=exclude), opened.topk(user_BD, 50, exclude=exclude), strict=True):
        assert torch.equal(a, b)
    base = opened.snapshot.segments[0].codes
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)  # mapped, not read
    save_index(tmp_path / "again", opened)
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / "index" / TENSORS).read_bytes()


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    codes_NM, centroids = catalogue(np.random.default_rng(0), 300, 2, 8, "random")
    folder = tmp_path / "index"

    def write() -> None:
        save_index(folder, PQIndex(codes_NM, centroids))

    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message):
            open_index(folder)
        write()

    with pytest.raises(ModelError, match=r"index\.json: no such file"):
        open_index(folder)
    write()
    whole = (folder / TENSORS).read_bytes()
    for place in (0, 20, len(whole) // 2, len(whole) - 1):
        altered = bytearray(whole)
        altered[place] ^= 1
        (folder / TENSORS).write_bytes(altered)
        refused(r"index\.safetensors: SHA-256 .* says")
    (folder / TENSORS).write_bytes(whole[:-5])
    refused(rf"{len(whole) - 5} bytes; index.json says {len(whole)}")
    (folder / TENSORS).unlink()
    refused(r"index\.safetensors: no such file")
    for field, value, message in (
        ("format", 9, "format 9; expected 1"),
        ("file", None, r"no field tensors, file\.bytes"),
        ("tensors", {}, r"index\.json says \{\}"),
        ("count", 10**9, "shapes do not fit"),
        ("kind", "recjpq_prune", "shapes do not fit"),
    ):
        write_json(folder / CARD, {**read_json(folder / CARD), field: value})
        refused(message)
    (folder / CARD).write_text("{")
    refused("not JSON")


def test_a_packaged_index_is_its_models(tmp_path: Path) -> None:
    """What `package` writes and the service opens: only for coded items, and refused beside another model."""

    def model(items: DenseItemsSettings | RecJPQItemsSettings, seed: int) -> SASRec:
        torch.manual_seed(seed)
        return SASRec(SASRecSettings(width=8, heads=2, items=items), Sizes(items=300, categories=1, actions=1)).eval()

    coded, other = (model(RecJPQItemsSettings(splits=2, codes=16), seed) for seed in (0, 1))
    dense = model(DenseItemsSettings(), 0)
    assert not write_index(tmp_path / "none", dense, RetrievalSettings(kind="pqtopk"))
    assert isinstance(load_index(tmp_path / "none", dense), DenseIndex)
    assert not write_index(tmp_path / "none", coded, RetrievalSettings(kind="dense"))
    assert write_index(tmp_path / "index", coded, RetrievalSettings(kind="pqtopk"))
    index = load_index(tmp_path / "index", coded)
    added = model(RecJPQItemsSettings(splits=2, codes=16, composition="sum"), 0)
    user_BD = torch.randn(3, 8)
    torch.testing.assert_close(index.topk(user_BD, 20)[1], DenseIndex(coded.item_vectors().detach()).topk(user_BD, 20)[1])
    for stranger in (other, added):
        with pytest.raises(ModelError, match=r"index\.json: made_of is [0-9a-f]{64}; expected [0-9a-f]{64}, the model's items: build"):
            load_index(tmp_path / "index", stranger)
    with pytest.raises(ModelError, match="index: an index of codes; expected none"):
        load_index(tmp_path / "index", dense)
    assert write_index(tmp_path / "added", added, RetrievalSettings(kind="pqtopk"))
    found = load_index(tmp_path / "added", added).topk(user_BD, 20)[1]
    torch.testing.assert_close(found, DenseIndex(added.item_vectors().detach()).topk(user_BD, 20)[1])


def test_an_index_of_other_codes_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Same centroids and sizes, so that nothing but the codes of one item tells the two apart."""
    torch.manual_seed(0)
    sizes = Sizes(items=300, categories=1, actions=1)
    model = SASRec(SASRecSettings(width=8, heads=2, items=RecJPQItemsSettings(splits=2, codes=16)), sizes).eval()
    folder = tmp_path / "index"
    assert write_index(folder, model, RetrievalSettings(kind="pqtopk"))
    for kind in ("auto", "pqtopk"):
        index = load_index(folder, model, RetrievalSettings(kind=kind))
        assert isinstance(index, PQIndex) and index.kind == "pqtopk"
    for kind in ("dense", "recjpq_prune"):
        with pytest.raises(ModelError, match=rf"index\.json: kind is pqtopk; expected {kind}, as retrieval\.kind says"):
            load_index(folder, model, RetrievalSettings(kind=kind))
    card = read_json(folder / CARD)
    del card["made_of"]
    write_json(folder / CARD, card)
    with pytest.raises(ModelError, match=r"index\.json: made_of is None; expected [0-9a-f]{64}, .* build the index again"):
        load_index(folder, model)
    assert write_index(folder, model, RetrievalSettings(kind="pqtopk"))
    assert isinstance(model.items, RecJPQItems)
    model.items.codes[150, 1] = (model.items.codes[150, 1] + 1) % 16
    with pytest.raises(ModelError, match="made_of"):
        load_index(folder, model)
    assert open_index(folder).items == 300  # as it was saved, whatever the model
