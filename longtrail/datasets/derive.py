"""Checked events to the tables' rows. Ibis expressions only: they run on any engine.

In between, keys are replaced by codes (dense, in key order), so that the large joins, sorts and windows work on integers. The ids that the
tables show come last: 1..N in order of (first seen, key), so that a longer log of the same kind only adds ids at the end.
"""

import ibis
import ibis.expr.types as ir


def codes(checked: ir.Table, key: str, code: str) -> ir.Table:
    """key → code, 0.., over the rows without fault."""
    keys = checked.filter(checked.fault == 0).select(key).distinct()
    return keys.mutate(**{code: ibis.row_number().over(order_by=keys[key])})


def code(checked: ir.Table, user_codes: ir.Table, item_codes: ir.Table) -> ir.Table:
    """The rows without fault, with user_code and item_code (int64) instead of their keys."""
    good = checked.filter(checked.fault == 0)
    joined = good.join(user_codes, "user_key").join(item_codes, "item_key")
    return joined.drop("user_key", "item_key", "fault")


def duplicates(coded: ir.Table) -> ir.Table:
    """order and by_place of the rows that repeat an earlier one.

    A row of a list repeats one when request and position are the same (where there is no position: request, user, item and time; where
    there is no request: user and time are it). Any other row when user, item, time and action are.
    """
    lists = coded.filter(coded.by_place)
    own = lists.request.isnull() | lists.position.isnull()
    lists = lists.select(
        "order",
        "by_place",
        "request",
        position=lists.position,
        user=own.ifelse(lists.user_code, -1),
        time=own.ifelse(lists.timestamp, -1),
        item=lists.position.isnull().ifelse(lists.item_code, -1),
    )
    others = coded.filter(~coded.by_place).select("order", "by_place", "user_code", "item_code", "timestamp", "action")
    return _repeats(lists, ["request", "position", "user", "time", "item"]).union(_repeats(others, ["user_code", "item_code", "timestamp", "action"]))


def _repeats(rows: ir.Table, keys: list[str]) -> ir.Table:
    ranked = rows.mutate(before=ibis.row_number().over(group_by=keys, order_by="order"))
    return ranked.filter(ranked.before > 0).select("order", "by_place")


def users_table(events: ir.Table, user_codes: ir.Table) -> ir.Table:
    """USERS and user_code."""
    seen = events.group_by("user_code").agg(first_seen=events.timestamp.min(), events=events.is_interaction.cast("int64").sum())
    keyed = seen.join(user_codes, "user_code")
    return keyed.mutate(user_id=_dense(keyed, "first_seen", "user_key"))


def items_table(events: ir.Table, item_codes: ir.Table, metadata: ir.Table | None, candidates: ir.Table | None) -> ir.Table:
    """ITEMS without category_id, and item_code (null for items that only were candidates, in `candidates`: request, item).

    Category and title are those of `metadata` (item, category, title, order), else of the item's first event that has them.
    """
    seen = events.group_by("item_code").agg(
        first_seen=events.timestamp.min(),
        popularity=events.is_interaction.cast("int64").sum(),
        category=events.category.argmin(events.order, where=events.category.notnull()),
        title=events.title.argmin(events.order, where=events.title.notnull()),
    )
    items = seen.join(item_codes, "item_code").select("item_code", "item_key", "first_seen", "popularity", "category", "title")
    if candidates is not None:
        unseen = _with_time(candidates, events).anti_join(items, [("item", "item_key")])
        unseen = unseen.group_by("item").agg(first_seen=unseen.timestamp.min())
        nothing = ibis.null("string")
        items = items.union(
            unseen.select(
                item_code=ibis.null("int64"),
                item_key="item",
                first_seen="first_seen",
                popularity=ibis.literal(0, "int64"),
                category=nothing,
                title=nothing,
            )
        )
    if metadata is not None:
        named = metadata.filter(metadata.item.notnull()).group_by("item")
        described = named.agg(
            own_category=metadata.category.argmin(metadata.order, where=metadata.category.notnull()),
            own_title=metadata.title.argmin(metadata.order, where=metadata.title.notnull()),
        )
        items = items.left_join(described, [("item_key", "item")])
        items = items.mutate(category=ibis.coalesce(items.own_category, items.category), title=ibis.coalesce(items.own_title, items.title))
        items = items.drop("item", "own_category", "own_title")
    return items.mutate(item_id=_dense(items, "first_seen", "item_key"))


def with_category_id(items: ir.Table) -> ir.Table:
    """`items` and category_id: dense from 1 in order of the first item that has the category; 0 where it is unknown."""
    known = items.filter(items.category.notnull())
    categories = known.group_by("category").agg(first=known.item_id.min())
    categories = categories.mutate(known_id=ibis.row_number().over(order_by=categories["first"]) + 1).select(name="category", known_id="known_id")
    joined = items.left_join(categories, [("category", "name")])
    return joined.mutate(category_id=joined.known_id.fill_null(0).cast("int32")).drop("name", "known_id")


def interactions(events: ir.Table, users: ir.Table, items: ir.Table) -> ir.Table:
    """INTERACTIONS, times as int64 µs, in order of time, then availability, then of the log."""
    rows = _with_ids(events.filter(events.is_interaction), users, items)
    return rows.order_by("timestamp", "available_at", "order").select("user_id", "item_id", "timestamp", "available_at", "action", "value")


def impressions(events: ir.Table, users: ir.Table, items: ir.Table) -> ir.Table:
    """IMPRESSIONS, times as int64 µs, in order of time, then availability, then of the log.

    A row without a request belongs to the request of its user and time; one without a position stands where the log has it in its request.
    """
    shown = events.filter(events.is_impression)
    rows = _with_ids(shown, users, items)
    rows = rows.mutate(request_id=ibis.coalesce(rows.request, rows.user_key + ":" + rows.timestamp.cast("string")))
    rows = rows.mutate(position=ibis.coalesce(rows.position, (ibis.row_number().over(group_by=_request(rows), order_by="order") + 1).cast("int32")))
    names = ["request_id", "user_id", "item_id", "timestamp", "available_at", "position", "click", "propensity", "policy"]
    return rows.order_by("timestamp", "available_at", "order").select(names)


def candidate_rows(candidates: ir.Table, events: ir.Table, items: ir.Table) -> ir.Table:
    """CANDIDATES of the requests that stand in the log, in order of time, then of the candidates' own log."""
    rows = _with_time(candidates, events).join(items.select("item_key", "item_id"), [("item", "item_key")])
    pairs = rows.group_by(["request", "item_id"]).agg(timestamp=rows.timestamp.min(), order=rows.order.min())
    return pairs.order_by("timestamp", "order").select(request_id="request", item_id="item_id")


def _request(rows: ir.Table) -> list[ir.Value]:
    own = rows.request.isnull()  # then integers tell requests apart, which is cheaper than their names
    return [rows.request, own.ifelse(rows.user_id, 0), own.ifelse(rows.timestamp, 0)]


def _with_time(candidates: ir.Table, events: ir.Table) -> ir.Table:
    shown = events.filter(events.is_impression & events.request.notnull())
    requests = shown.group_by(known="request").agg(timestamp=shown.timestamp.min())
    cleaned = candidates.select("order", request=candidates.request.strip(), item=candidates.item.strip().nullif(""))
    return cleaned.filter(cleaned.item.notnull()).join(requests, [("request", "known")]).drop("known")


def _with_ids(events: ir.Table, users: ir.Table, items: ir.Table) -> ir.Table:
    rows = events.join(users.select("user_code", "user_id", "user_key"), "user_code")
    return rows.join(items.filter(items.item_code.notnull()).select("item_code", "item_id"), "item_code")


def _dense(rows: ir.Table, *by: str) -> ir.IntegerValue:
    return ibis.row_number().over(order_by=[rows[name] for name in by]) + 1
