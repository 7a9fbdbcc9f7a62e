"""Pictures of the rankers: how a history is read for a candidate."""

from docs.images.models.picture import Picture


def mean_pooling() -> Picture:
    p = Picture("Mean pooling: one mean of the history for every candidate", 190)
    xs = p.row(30, 30, ["k1", "k2", "k3", "k4", "k5"])
    p.note(30, 22, "history")
    for i, x in enumerate(xs):
        p.arrow((x, 62), (144 + i * 16, 104))
    p.box(126, 106, 100, 34, "u = mean", "read").arrow((228, 123), (330, 123)).note(236, 114, "the same for all")
    for i, y in enumerate((40, 84, 128)):
        p.box(340, y + 14, 64, 30, f"q{i + 1}", "query").arrow((406, y + 29), (470, y + 29))
        p.box(474, y + 14, 200, 30, f"head([q{i + 1} ; u ; q{i + 1} ∗ u])", "net", "small")
    return p.note(340, 36, "candidates")


def din() -> Picture:
    p = Picture("DIN: a small net weighs every pair of candidate and behaviour", 250)
    p.box(20, 24, 64, 30, "q", "query").note(20, 18, "candidate")
    xs = p.row(150, 190, ["k1", "k2", "k3", "k4", "k5"], w=60, gap=24)
    p.note(150, 240, "history: every event is read, none is dropped")
    p.arrow((86, 39), (xs[-1], 39), tip=False)
    for i, (x, high) in enumerate(zip(xs, (10, 44, 16, 30, 6), strict=True)):
        p.arrow((x, 39), (x, 62)).box(x - 30, 64, 60, 28, "MLP", "net", "small").arrow((x, 188), (x, 94), faint=True)
        p.box(x + 12, 166 - high, 14, high, kind="read").text(x + 38, 166, f"a{i + 1}", "small")
    p.arrow((566, 205), (596, 205)).box(598, 188, 108, 34, "u = Σ aⱼ kⱼ", "read")
    return p.arrow((652, 186), (652, 120)).box(584, 60, 124, 56, "head", "net").text(646, 50, "[q ; u ; q ∗ u]", "small")


def dien() -> Picture:
    p = Picture("DIEN: two recurrences, the second one gated by attention to the candidate", 270)
    xs = p.row(120, 214, ["k1", "k2", "k3", "k4"], w=70, gap=44)
    ys = (("GRU", 150), ("AUGRU", 40))
    for name, y in ys:
        for i, x in enumerate(xs):
            p.box(x - 35, y, 70, 32, name, "net", "small")
            if i:
                p.arrow((xs[i - 1] + 37, y + 16), (x - 37, y + 16))
    for i, x in enumerate(xs):
        p.arrow((x, 212), (x, 184)).arrow((x, 148), (x, 112)).box(x - 24, 84, 48, 26, f"a{i + 1}", "query", "small").arrow((x, 84), (x, 74))
    p.box(16, 82, 60, 30, "q", "query").arrow((78, 97), (xs[0] - 26, 97)).note(16, 74, "candidate")
    p.note(16, 170, "interests").note(16, 52, "evolution").note(16, 234, "history")
    p.arrow((xs[-1] + 37, 56), (602, 56)).box(604, 40, 100, 34, "u = hₙ → head", "read", "small")
    return p.note(556, 97, "aₜ scales the update").note(556, 113, "gate: 0 keeps the state")


def sim() -> Picture:
    p = Picture("SIM: first a search by category, then attention to what was found", 220)
    cats = ["A", "B", "A", "C", "B", "A", "C", "C", "A", "B"]
    for i, cat in enumerate(cats):
        p.box(30 + i * 48, 40, 40, 30, cat, "event" if cat == "A" else "off")
    p.note(30, 30, "history, each event with its category").box(30, 130, 100, 34, "q: category A", "query", "small").note(30, 122, "candidate")
    found = [50 + i * 48 for i, cat in enumerate(cats) if cat == "A"][1:]
    for x, to in zip(found, (230, 278, 326), strict=True):
        p.arrow((x, 72), (to, 128)).box(to - 20, 130, 40, 30, "A", "event")
    p.note(206, 184, "stage 1: the K newest alike").arrow((132, 147), (206, 147)).arrow((348, 147), (396, 147))
    p.box(400, 128, 130, 36, "target attention", "net", "small").arrow((532, 147), (574, 147)).box(578, 128, 110, 36, "u → head", "read")
    return p.note(400, 184, "stage 2: weights over K events").note(30, 206, "Soft search: largest (q W_a)·(k W_b) in place of the category.")


def eta() -> Picture:
    p = Picture("ETA: events whose hash is nearest to the candidate's are read", 220)
    hashes, far = ["0110", "1001", "0111", "1000", "0010", "1101"], [0, 4, 1, 3, 1, 3]
    p.note(150, 28, "history: SimHash of each event, signs of k R")
    for i, (bits, distance) in enumerate(zip(hashes, far, strict=True)):
        x, near = 150 + i * 88, distance < 2
        p.box(x, 38, 72, 30, bits, "event" if near else "off").text(x + 36, 88, f"distance {distance}", "small")
        if near:
            p.arrow((x + 36, 94), (300 + (i - 2) * 30, 136))
    p.box(20, 38, 90, 30, "q: 0110", "query").note(20, 28, "candidate").note(20, 88, "signs of q R")
    p.box(230, 138, 140, 32, "K nearest", "event").arrow((372, 154), (406, 154)).box(410, 138, 130, 32, "target attention", "net", "small")
    return (
        p.arrow((542, 154), (576, 154))
        .box(580, 138, 110, 32, "u → head", "read")
        .note(230, 194, "R is random and fixed: the search has nothing to train.")
    )


def twin() -> Picture:
    p = Picture("TWIN: the attention's own scores do the search", 240)
    heights, kept = [14, 46, 20, 8, 60, 30, 12, 52, 10, 24], {1, 4, 7}
    for i, high in enumerate(heights):
        p.box(150 + i * 40, 90 - high, 24, high, kind="read" if i in kept else "off").box(150 + i * 40, 94, 24, 20, kind="event")
    p.box(20, 60, 90, 32, "q", "query").note(20, 52, "candidate").arrow((112, 76), (142, 76))
    p.note(150, 22, "score = (q W_q)·(k W_k) / √d + bias(action, age), for all L events").note(564, 108, "history")
    for i, to in zip(sorted(kept), (250, 290, 330), strict=True):
        p.arrow((162 + i * 40, 116), (to, 156)).box(to - 12, 158, 24, 24, kind="event")
    p.note(236, 204, "the K best").arrow((350, 170), (396, 170)).box(400, 152, 150, 36, "softmax of the scores", "net", "small")
    p.arrow((552, 170), (584, 170)).box(588, 152, 110, 36, "u → head", "read").note(330, 210, "The same scores weigh what was found: the search")
    return p.note(330, 226, "keeps what attention would weigh most.")


def sdim() -> Picture:
    p = Picture("SDIM: events are summed by hash signature; a candidate looks up its own signature", 240)
    for i, (bits, keys) in enumerate((("00", "k2 + k7"), ("01", "k1 + k4 + k6"), ("10", "k3"), ("11", "k5 + k8"))):
        y = 50 + i * 38
        p.box(220, y, 44, 30, bits, "off").box(268, y, 150, 30, keys, "read" if bits == "01" else "event", "small")
    p.box(20, 96, 120, 40, "history", "event").arrow((142, 116), (214, 116)).note(146, 106, "signs of k R")
    p.note(220, 40, "M tables of sums, once a request").box(470, 24, 90, 32, "q: 01", "query").note(570, 36, "signs of q R:")
    p.note(570, 52, "one look-up a hash").arrow((515, 58), (515, 103), (422, 103)).arrow((422, 112), (560, 134))
    p.box(564, 116, 140, 40, "u = mean over M", "read", "small").arrow((634, 158), (634, 186)).box(594, 188, 80, 32, "head", "net")
    return p.note(220, 222, "Colliding events are one sum: likely alike, never certain.")


def sam() -> Picture:
    p = Picture("SAM: the candidate reads the history several times; each memory decides what the next pass asks", 270)
    p.box(16, 70, 70, 34, "q", "query").note(16, 62, "candidate").arrow((88, 87), (116, 87))
    for i in range(3):
        x = 120 + i * 170
        p.box(x, 66, 70, 42, f"pass {i + 1}", "net").arrow((x + 72, 87), (x + 88, 87)).box(x + 90, 70, 48, 34, f"m{i + 1}", "read")
        p.arrow((x + 35, 170), (x + 35, 112)).text(x + 64, 152, f"u{i + 1}", "small").arrow((x + 140, 87), (x + 166, 87))
        p.arrow((x + 20, 64), (x + 20, 40)).box(x, 12, 70, 26, f"s{i + 1}", "off", "small")
    p.box(112, 172, 516, 46).row(126, 180, [f"k{i}" for i in range(1, 8)], w=58, gap=14)
    p.note(20, 238, "history: every pass weighs all L events by a small net of its own, which is told q and the last memory")
    p.note(20, 256, "u: what was read · m: memory of a GRU, at first q · s: the weights by recency, compressed")
    return p.box(632, 60, 76, 54, "head", "net").note(600, 132, "[q ; s ; m ; …]")


def ifa() -> Picture:
    p = Picture("IFA: the history becomes a small state without candidates; all candidates read it and each other", 270)
    xs = p.row(20, 30, ["k1", "k2", "k3", "…", "kL"], w=44, gap=10)
    p.note(20, 22, "history")
    for i, x in enumerate(xs):
        p.arrow((x, 62), (110 + i * 22, 98))
    p.box(60, 100, 190, 44, "A = Σ φ(k) vᵀ,  z = Σ φ(k)", "read", "small").note(40, 164, "user state: about a thousand numbers,")
    p.note(40, 180, "additive, no candidate in it, can be stored")
    p.arrow((252, 122), (322, 122)).note(262, 112, "φ(q)ᵀ A")
    for i, y in enumerate((46, 106, 166)):
        p.box(330, y, 54, 32, f"q{i + 1}", "query").arrow((386, y + 16), (420, y + 16)).box(424, y, 80, 32, f"X{i + 1}", "event")
        p.arrow((506, y + 16), (536, y + 16)).arrow((614, y + 16), (640, y + 16)).box(644, y, 60, 32, "head", "net", "small")
    p.box(540, 40, 72, 164, "", "net").text(576, 114, "attention", "small").text(576, 130, "among", "small").text(576, 146, "candidates", "small")
    p.note(330, 36, "all candidates of a request at once")
    p.row(20, 214, ["newest 100 events"], w=200)
    return p.arrow((222, 229), (464, 229), (464, 202)).note(240, 246, "exact attention (optional)")
