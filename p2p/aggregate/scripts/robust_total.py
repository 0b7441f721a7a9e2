def robust_total(tensors: List[Tensor], keys: List[str], args: List[str]):
    # args: elements of the gradient, then the rule's; all behind the gradient is summed
    length = int(args[0])
    out = total(tensors, keys, args)
    gradients = [each.narrow(0, 0, length) for each in tensors]
    out.narrow(0, 0, length).copy_(rule(gradients, keys, args[1:]).mul_(len(tensors)))
    return out
