"""LSG attention, stated key by key in float64: slow, obvious, and independent of the package."""

import torch


def sparse_sequence(key, value, keep, first_query, block, sparse, factor, kind, head):
    """The sparse keys of one row and head: a list of (key, value, place), None where a key is absent or masked."""
    length, width = key.shape
    if kind == "none" or not sparse or not factor:
        return []
    if factor == 1:
        return [(key[i], value[i], i) if keep[i] else None for i in range(length)]
    if kind in ("stride", "block_stride"):
        if kind == "stride":
            picked = [j * factor + head % factor for j in range(length // factor)]
        else:
            size = block // factor
            picked = [b + (head * size + j) % block for b in range(0, length, block) for j in range(size)]
        return [(key[i], value[i], i) if keep[i] else None for i in picked]
    result = []
    if kind == "norm":
        chunk = min(block, sparse)
        for start in range(0, length, chunk):
            norms = [float(key[i].norm()) if keep[i] else -1.0 for i in range(start, start + chunk)]
            order = sorted(range(chunk), key=lambda j: -norms[j])[: chunk // factor]
            picked = [start + j for j in sorted(order)]
            result += [(key[i], value[i], i) if keep[i] else None for i in picked]
        return result
    for start in range(0, length, factor):
        run = [i for i in range(start, start + factor) if keep[i]]
        if not run:
            result.append(None)
            continue
        if kind == "pooling":
            weight = torch.full((len(run),), 1 / len(run), dtype=torch.float64)
        else:
            weight = torch.softmax(torch.stack([key[i] @ first_query / width**0.5 for i in run]), dim=0)
        result.append((weight @ key[run], weight @ value[run], round(sum(run) / len(run))))
    return result


def attention(query, key, value, keep, *, g=1, block=4, sparse=4, factor=2, kind="norm", causal=False, bias=None):
    """The output for one row: query, key, value of shape (heads, g + t, width), keep of shape (g + t,).

    `bias`, (heads, 2 * reach + 1), adds `bias[head, reach + p - p']` to the score of a query at p and a key at p'; or
    it is a function of the head, query, key and `p - p'`.
    """
    query, key, value = query.double(), key.double(), value.double()
    output = torch.zeros_like(query)
    heads, total, width = query.shape
    text = total - g
    padded = -(-text // block) * block

    def added(head, q, place, k, key_place):
        if bias is None or place is None or key_place is None:  # a global token has none
            return 0.0
        if callable(bias):
            return float(bias(head, q, k, place - key_place))
        reach = bias.shape[1] // 2
        return float(bias[head, reach + min(max(place - key_place, -reach), reach)])

    def attend(head, q, place, seen):
        seen = [key for key in seen if key is not None]
        if not seen:
            return torch.zeros(width, dtype=torch.float64)
        keys, values = (torch.stack(part) for part in list(zip(*seen, strict=True))[:2])
        biases = torch.tensor([added(head, q, place, k, key_place) for k, _, key_place in seen], dtype=torch.float64)
        return torch.softmax(keys @ q / width**0.5 + biases, dim=0) @ values

    for head in range(heads):
        places = [None] * g + list(range(text))
        everything = [(key[head, i], value[head, i], places[i]) if keep[i] else None for i in range(total)]
        short = text <= 2 * block
        for i in range(total if short else g):
            seen = everything[: max(i + 1, g)] if causal else everything
            output[head, i] = query[head, i] if causal and i < g else attend(head, query[head, i], places[i], seen)
        if short:
            continue
        pad = [(0, 0, 0, padded - text)]
        text_key, text_value = (torch.nn.functional.pad(x[head, g:], pad[0]) for x in (key, value))
        text_keep = [bool(k) for k in keep[g:]] + [False] * (padded - text)
        shortened = sparse_sequence(text_key, text_value, text_keep, query[head, g], block, sparse, factor, kind, head)
        for position in range(text):
            i = position // block
            seen = everything[:g]
            stop = position + 1 if causal else (i + 2) * block
            seen = seen + [everything[g + j] for j in range((i - 1) * block, stop) if 0 <= j < text]
            if shortened:
                step = block // factor
                left = range((i - 1) * step - sparse, (i - 1) * step)
                right = range(0) if causal else range((i + 2) * step, (i + 2) * step + sparse)
                seen = seen + [shortened[j] for j in (*left, *right) if 0 <= j < len(shortened)]
            output[head, g + position] = attend(head, query[head, g + position], position, seen)
    return output
