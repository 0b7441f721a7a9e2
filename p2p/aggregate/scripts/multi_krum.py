def distances(tensors: List[Tensor]):
    n, size = len(tensors), tensors[0].numel()
    found = torch.zeros([n, n], dtype=7)
    for start in range(0, size, 16384):
        length = min(16384, size - start)
        rows = [each.narrow(0, start, length).to(7) for each in tensors]
        for i in range(n):
            for j in range(i):
                apart = rows[i] - rows[j]
                found[i, j] += (apart * apart).sum()
    return found + found.t()


def multi_krum(tensors: List[Tensor], keys: List[str], args: List[str]):
    n, f, m = len(tensors), int(args[0]), int(args[1])
    nearest = distances(tensors).sort(1)[0]
    # the first is the distance to itself
    scores = nearest.narrow(1, 1, n - f - 2).sum(1)
    chosen = scores.argsort(stable=True, dim=0).narrow(0, 0, m).sort(0)[0]
    out = tensors[int(chosen[0])].clone()
    for i in range(1, m):
        out.add_(tensors[int(chosen[i])])
    return out.div_(m)
