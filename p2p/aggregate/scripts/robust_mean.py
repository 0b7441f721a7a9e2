def robust_mean(tensors: List[Tensor], keys: List[str], args: List[str]):
    # args: elements of the gradient, the share of each vector in the whole, then the rule's
    length, n = int(args[0]), len(tensors)
    gradients: List[Tensor] = []
    for i in range(n):
        gradients.append(tensors[i].narrow(0, 0, length).div(float(args[1 + i])))
    return rule(gradients, keys, args[1 + n :])
