#!/bin/sh
# vllm-router between `veneer serve --upstream http://router:8000` and vLLM servers or `veneer serve` engines.
# Arguments: the engines' URLs, as http://gpu1:8000 http://gpu2:8000
# consistent_hash reads x-session-id, which veneer sets to the tenant's user, or to the adapter without a user.
exec vllm-router --host 0.0.0.0 --port "${PORT:-8000}" --policy "${POLICY:-consistent_hash}" \
    --request-timeout-secs 600 --health-check-interval-secs 2 --health-failure-threshold 2 \
    --request-id-headers x-request-id --prometheus-port "${METRICS_PORT:-29000}" --worker-urls "$@"
