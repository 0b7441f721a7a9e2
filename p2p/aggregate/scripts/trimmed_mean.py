def trimmed_mean(tensors: List[Tensor], keys: List[str], args: List[str]):
    n, size, f = len(tensors), tensors[0].numel(), int(args[0])
    out = torch.empty_like(tensors[0])
    for start in range(0, size, 16384):
        length = min(16384, size - start)
        rows = torch.stack([each.narrow(0, start, length) for each in tensors]).sort(0)[0]
        out.narrow(0, start, length).copy_(rows.narrow(0, f, n - 2 * f).mean(0))
    return out
