def meamed(tensors: List[Tensor], keys: List[str], args: List[str]):
    n, size, f = len(tensors), tensors[0].numel(), int(args[0])
    out = torch.empty_like(tensors[0])
    for start in range(0, size, 16384):
        length = min(16384, size - start)
        rows = torch.stack([each.narrow(0, start, length) for each in tensors])
        middle = rows.sort(0)[0].narrow(0, (n - 1) // 2, 2 - n % 2).mean(0)
        nearest = (rows - middle).abs().argsort(stable=True, dim=0).narrow(0, 0, n - f)
        out.narrow(0, start, length).copy_(rows.gather(0, nearest.sort(0)[0]).mean(0))
    return out
