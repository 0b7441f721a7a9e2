def sgd(tensors: List[Tensor], keys: List[str], args: List[str]):
    parameters = tensors[0].clone()
    gradient = tensors[1]
    has_buffer = len(tensors) > 2
    buffer = gradient
    if has_buffer:
        buffer = tensors[2].clone()
    for i in range(int(args[0])):
        at = 1 + 9 * i
        start, stop = int(args[at]), int(args[at + 1])
        lr, momentum, dampening = float(args[at + 2]), float(args[at + 3]), float(args[at + 4])
        decay = float(args[at + 5])
        nesterov, first, maximize = args[at + 6] == "1", args[at + 7] == "1", args[at + 8] == "1"
        p = parameters.narrow(0, start, stop - start)
        g = gradient.narrow(0, start, stop - start)
        if maximize:
            g = -g
        if decay != 0.0:
            g = g.add(p, alpha=decay)
        if momentum != 0.0:
            b = buffer.narrow(0, start, stop - start)
            if first:
                b.copy_(g)
            else:
                b.mul_(momentum).add_(g, alpha=1 - dampening)
            g = g.add(b, alpha=momentum) if nesterov else b
        p.add_(g, alpha=-lr)
    if has_buffer:
        return [parameters, buffer]
    return [parameters]
