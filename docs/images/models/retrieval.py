"""Pictures of the retrievers, the item slot, the attention slot and the losses."""

from docs.images.models.picture import Picture


def popularity() -> Picture:
    p = Picture("Popularity: count, sort, the same list for everybody", 190)
    for i, items in enumerate((["b", "a"], ["b", "c"], ["a", "b"])):
        p.row(20, 40 + i * 40, items, w=40, h=30, gap=8)
    p.note(20, 30, "training log").arrow((116, 95), (168, 95)).note(122, 86, "count")
    for x, name in zip(p.bars(180, 150, [60, 90, 30], w=30, gap=14), "abc", strict=True):
        p.text(x, 168, name, "small")
    p.arrow((316, 95), (368, 95)).note(324, 86, "sort")
    p.row(380, 80, ["b", "a", "c"], w=40, h=30, gap=8, kind="read")
    p.note(380, 72, "one list")
    for i, (who, items) in enumerate((("user 1", ["a", "c"]), ("user 2", ["b", "a"]), ("user 3", ["c"]))):
        y = 40 + i * 40
        p.arrow((526, 95), (556, y + 15), faint=True).text(585, y + 20, who, "small")
        p.row(616, y, items, w=34, h=30, gap=6, kind="read")
    return p.note(704, 30, "less what each has seen", "end")


def markov() -> Picture:
    p = Picture("Markov chain: counts of what came right after the last item", 200)
    xs = p.row(20, 80, ["…", "12", "7"], kind="off")
    p.box(212, 80, 52, 30, "31", "event").arrow((266, 95), (300, 95)).text(316, 101, "?", "bold").note(190, 70, "the only thing read")
    for a, b in zip(xs, [*xs[1:], 238], strict=True):
        p.arrow((a + 28, 95), (b - 28, 95))
    p.note(20, 70, "history").note(380, 30, "row of 31: what came next, how often")
    for x, (item, n) in zip(p.bars(390, 130, [75, 45, 15], w=40, gap=20, kind="read"), (("7", 5), ("40", 3), ("2", 1)), strict=True):
        p.text(x, 150, item).text(x, 168, f"× {n}", "note")
    p.text(592, 96, "+ μ ×").bars(626, 130, [30, 24, 18, 12], w=14, kind="off")
    return p.note(616, 150, "popularity")


def sasrec() -> Picture:
    p = Picture("SASRec: each state sees its own event and those before it, and names the next", 250)
    xs, top = p.row(130, 180, ["i1", "i2", "i3", "i4"], w=70, gap=60), 100
    for t, x in enumerate(xs):
        p.box(x - 35, top, 70, 30, f"s{t + 1}", "read").arrow((x, top - 2), (x, 66))
        p.box(x - 35, 34, 70, 30, ["i2", "i3", "i4", "next"][t], "query")
        for before in xs[: t + 1]:
            p.arrow((before, 178), (x, top + 32), faint=before != x)
    p.note(20, 54, "must name").note(20, 120, "states").note(20, 200, "events").note(130, 236, "No arrow leads back: a state never sees what comes.")
    return p.box(640, 100, 66, 30, "user", "off", "small").arrow((xs[-1] + 37, 115), (636, 115))


def gsasrec() -> Picture:
    p = Picture("gSASRec: a positive and K sampled negatives; beta weighs the positive, the prior shifts all logits", 240)
    p.box(20, 96, 70, 34, "state", "read").arrow((92, 113), (136, 72)).arrow((92, 113), (136, 156))
    p.box(140, 54, 110, 34, "next item", "query").note(140, 46, "1 positive")
    p.row(140, 140, ["", "", "", "", "", ""], w=26, gap=5, kind="bad")
    p.note(140, 190, "K = 256 negatives, drawn uniformly")
    p.arrow((252, 71), (356, 71)).arrow((326, 155), (356, 155)).box(360, 54, 150, 34, "β · log σ(s⁺)", "net").box(
        360, 138, 150, 34, "Σ log(1 − σ(s⁻))", "net"
    )
    p.arrow((430, 112), (430, 92)).arrow((430, 114), (430, 134)).note(442, 117, "pull up, push down")
    p.note(530, 76, "β < 1: the paper's").note(530, 92, "mend of over-confidence")
    return p.note(360, 212, "prior (ours): s + log(β / K) in both, so that at the start").note(360, 228, "pull and push are of one size")


def bert4rec() -> Picture:
    p = Picture("BERT4Rec: masked events are filled in from both sides", 250)
    for y, name, labels in ((56, "training", ["i1", "mask", "i3", "i4", "mask", ""]), (176, "serving", ["i1", "i2", "i3", "i4", "i5", "mask"])):
        p.note(20, y + 20, name)
        for i, label in enumerate(labels):
            if label:
                p.box(120 + i * 90, y, 70, 30, label, "query" if label == "mask" else "event")
    for x, name in ((245, "i2"), (515, "i5")):
        p.arrow((x, 54), (x, 40)).text(x, 34, name, "bold")
    for x in (155, 335, 425):
        p.arrow((x, 88), (x, 104), (245, 104), (245, 89), faint=True)
        p.arrow((x, 88), (x, 112), (515, 112), (515, 89), faint=True)
    for x in (155, 245, 335, 425, 515):
        p.arrow((x, 208), (x, 224), (605, 224), (605, 209), faint=True)
    return p.note(120, 132, "every place looks at every other; only the masked ones are asked").note(600, 168, "the next event", "middle")


def gru4rec() -> Picture:
    p = Picture("GRU4Rec: a memory rewritten by each event", 230)
    xs = p.row(130, 170, ["i1", "i2", "i3", "i4"], w=70, gap=60)
    for t, x in enumerate(xs):
        p.arrow((x, 168), (x, 136)).box(x - 35, 100, 70, 34, "GRU", "net").arrow((x, 98), (x, 66))
        p.box(x - 35, 34, 70, 30, f"s{t + 1}", "read").arrow((x + 37, 117), (x + 92, 117)).text(x + 62, 110, f"h{t + 1}", "small")
    p.text(60, 122, "0", "small").arrow((68, 117), (xs[0] - 38, 117)).note(20, 190, "events").note(20, 54, "states W h + b")
    return p.note(600, 146, "an event, a step").note(130, 222, "Each state must name the event after it.")


def blossom() -> Picture:
    p = Picture("Blossom attention: the best blocks and the own block; the newest events and power-of-two distances; a gate mixes them", 300)
    x0, w, now = 130, 11, 43
    for i in range(now + 1):
        block, distance = i // 4, now - i
        p.box(x0 + i * w, 40, w - 2, 22, kind="read" if block == now // 4 else "event" if block in (0, 3, 6, 8) else "off")
        short = distance < 8 or distance in (8, 16, 32)
        p.box(x0 + i * w, 120, w - 2, 22, kind="query" if short else "off")
    for b in range(now // 4):
        x = x0 + b * 4 * w
        p.box(x + 8, 204, 26, 22, f"c{b + 1}", "event" if b in (0, 3, 6, 8) else "off", "small")
    p.note(20, 56, "long-term").note(x0, 32, "the best 4 blocks that end before now, and the own block up to now (blocks of 16; drawn: 4)")
    p.note(20, 136, "short-term").note(x0, 112, "the last 8 events, then distances 8, 16, 32, 64, …")
    p.note(20, 220, "block keys").note(x0, 196, "one key a block, by a small MLP; q · c says which blocks are best")
    p.arrow((x0 + 3 * 4 * w + 20, 202), (x0 + 3 * 4 * w + 20, 64), faint=True).text(x0 + now * w + 5, 92, "▲ now", "small")
    p.arrow((618, 51), (640, 86)).arrow((618, 131), (640, 106)).box(640, 80, 68, 32, "gate", "net").arrow((674, 114), (674, 156)).box(
        640, 158, 68, 32, "output", "read"
    )
    return p.note(20, 256, "Never an L×L tensor: a query reads 80 keys of the long path and about 8 + log₂ L of the short one.").note(
        20, 276, "Who makes the block keys better is the selector's question: frozen, straight_through or compressed."
    )


def recjpq() -> Picture:
    p = Picture("RecJPQ: an item is M codes of one byte; its vector is put together from the pieces they name", 270)
    p.box(20, 40, 100, 34, "item 4711", "query").arrow((122, 57), (176, 57)).note(180, 30, "M = 3 codes of one byte")
    for i, code in enumerate(("17", "203", "5")):
        x = 180 + i * 140
        p.box(x, 40, 60, 34, code, "query").arrow((x + 30, 76), (x + 30, 104))
        for j in range(5):
            p.box(x, 106 + j * 16, 60, 14, kind="read" if j == (1, 3, 0)[i] else "off")
        p.text(x + 84, 150, f"Ψ{'₀₁₂'[i]}", "small").arrow(
            (x + 62, 113 + (1, 3, 0)[i] * 16), (x + 70, 113 + (1, 3, 0)[i] * 16), (x + 70, 200), faint=True
        )
        p.box(x, 202, 138, 30, f"piece {code}", "read", "small")
    p.note(20, 150, "pieces: 256 of each,").note(20, 166, "trained, shared by").note(20, 182, "all items").note(20, 222, "vector of the item")
    return p.note(180, 254, "concat (the paper's): side by side, each D / M wide · sum (ours): each D wide, added up")


def losses() -> Picture:
    p = Picture("Which items each loss looks at", 250)
    rows = (
        ("softmax", "all N items", lambda i: "query" if i == 5 else "bad"),
        ("sampled softmax, gBCE", "the target and K drawn items", lambda i: "query" if i == 5 else "bad" if i % 4 == 1 and i != 5 else "off"),
        ("BCE", "the target and one drawn item", lambda i: "query" if i == 5 else "bad" if i == 13 else "off"),
        ("LambdaRank", "pairs across the first places of the sorted list", lambda i: "query" if i in (0, 3, 8) else "bad" if i < 12 else "off"),
    )
    for r, (name, what, kind) in enumerate(rows):
        y = 30 + r * 52
        p.text(20, y + 15, name, "bold", "start").note(20, y + 32, what)
        for i in range(20):
            p.box(330 + i * 18, y + 2, 14, 28, kind=kind(i))
    return p.note(330, 240, "yellow: up · red: down · grey: not looked at")
