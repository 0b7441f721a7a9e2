def adam(tensors: List[Tensor], keys: List[str], args: List[str]):
    parameters, gradient = tensors[0].clone(), tensors[1]
    averages, squares = tensors[2].clone(), tensors[3].clone()
    largest = squares
    if len(tensors) > 4:
        largest = tensors[4].clone()
    for i in range(int(args[0])):
        at = 1 + 10 * i
        start, length = int(args[at]), int(args[at + 1]) - int(args[at])
        lr, beta1, beta2 = float(args[at + 2]), float(args[at + 3]), float(args[at + 4])
        eps, decay = float(args[at + 5]), float(args[at + 6])
        amsgrad, maximize, step = args[at + 7] == "1", args[at + 8] == "1", int(args[at + 9])
        p, g = parameters.narrow(0, start, length), gradient.narrow(0, start, length)
        m, v = averages.narrow(0, start, length), squares.narrow(0, start, length)
        if maximize:
            g = -g
        if decay != 0.0:
            g = g.add(p, alpha=decay)
        m.lerp_(g, 1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        root = (1.0 - beta2**step) ** 0.5
        if amsgrad:
            w = largest.narrow(0, start, length)
            w.copy_(torch.maximum(w, v))
            denominator = (w.sqrt() / root).add_(eps)
        else:
            denominator = (v.sqrt() / root).add_(eps)
        p.addcdiv_(m, denominator, value=-lr / (1.0 - beta1**step))
    if len(tensors) > 4:
        return [parameters, averages, squares, largest]
    return [parameters, averages, squares]
