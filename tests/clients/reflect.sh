#!/usr/bin/env bash
# Calls the router with nothing but its reflection: lists its services and backends, embeds a text,
# and asks for a model that there is not. One JSON value a line.
#
#   reflect.sh buf|grpcurl PATH-OF-THE-TOOL ADDRESS MODEL
set -euo pipefail
kind=$1 tool=$2 address=$3 model=$4
router=tollgate.router.v1.RouterService embedder=tollgate.embedder.v1.EmbedderService
body='{"model": "'$model'", "inputs": ["Who pays the pilot?"]}'

call() {
  if [ "$kind" = buf ]; then
    "$tool" curl --protocol grpc --http2-prior-knowledge -H 'tollgate-tenant: acme' -d "$2" \
      "http://$address/$1"
  else
    "$tool" -plaintext -H 'tollgate-tenant: acme' -emit-defaults -d "$2" "$address" "$1"
  fi
}

compact() { tr -d '\n' && echo; }

if [ "$kind" = buf ]; then
  "$tool" curl --protocol grpc --http2-prior-knowledge --list-services "http://$address" | tr '\n' ' '
else
  "$tool" -plaintext "$address" list | tr '\n' ' '
fi
echo
call "$router/ListBackends" '{}' | compact
call "$embedder/Embed" "$body" | compact
# An error goes to standard error, and the exit code says so.
if refused=$(call "$embedder/Embed" '{"model": "no-such-model", "inputs": ["x"]}' 2>&1); then
  echo "an unknown model was embedded with: $refused" >&2
  exit 1
fi
compact <<<"$refused"
