"""RedisAI's tensors, scripts and DAGs, as a module in C++ that a stock Valkey or Redis loads.

`build.py` compiles it against the installed torch, once. The story of the sources: `module.cpp` is
loaded and registers the commands, which `commands.cpp` and `introspection.cpp` have; `plans.cpp`
makes of a command's words, which `plan_syntax.cpp` takes apart, what is to be done,
`executions.cpp` has it done and stores what comes of it, `jobs.cpp` keeps that off the server's
main thread; `scripts.cpp` is TorchScript, with what keeps a script from harming the server;
`tensors.cpp` and `keys.cpp` are values of keys, and `replies.cpp` shows them.
"""
