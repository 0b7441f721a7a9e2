def mean(tensors: List[Tensor], keys: List[str], args: List[str]):
    out = torch.empty_like(tensors[0])
    size = out.numel()
    for start in range(0, size, 131072):
        length = min(131072, size - start)
        part, first = out.narrow(0, start, length), tensors[0].narrow(0, start, length)
        if len(tensors) == 1:
            part.copy_(first)
        else:
            torch.add(first, tensors[1].narrow(0, start, length), out=part)
        for i in range(2, len(tensors)):
            part.add_(tensors[i].narrow(0, start, length))
        part.div_(len(tensors))
    return out
