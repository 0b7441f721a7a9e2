"""The platform on one machine: a process that serves AWS Lambda's APIs on loopback.

    python -m launcher.emulator --config functions.json --listen 127.0.0.1:0 \
        --ready-file ready.json --log-dir logs

It speaks Lambda's Invoke API to whoever calls functions (through boto3), and Lambda's Runtime API
to the functions, each of which is a process of its own under AWS's own runtime client. Time
limits, memory limits, retries, throttling, cold and warm starts and starts from a snapshot are
Lambda's, so what runs here runs there; a small control API lets chaos misuse it. Requests are not
authenticated: it listens on loopback only.

Not here: anything that knows of Mayfly's runs; deploying to AWS; layers, versions, aliases,
streams of results, client contexts.
"""
