#!/usr/bin/env bash
# chromium.sh: see to it that a headless Chromium is there for the tests that look at the report.
#
# Never fails: where it cannot be had, this says why, and those tests skip with a reason.
set -uo pipefail

skip() { echo "chromium: $1; the tests that open the report in a browser will be skipped." >&2; exit 0; }

for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done
command -v apt-get >/dev/null || skip "not installed, and this machine has no apt"
[[ $(id -u) == 0 ]] || skip "not installed, and installing it needs root (apt-get install chromium)"

echo "Installing chromium for the tests that look at the report." >&2
export DEBIAN_FRONTEND=noninteractive
timeout 600 bash -c 'apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium' \
    >/dev/null 2>&1 || skip "apt could not install it"
exit 0
