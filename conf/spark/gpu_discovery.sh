#!/bin/sh
# The GPUs of this host, as Spark wants them: {"name": "gpu", "addresses": ["GPU-...", "MIG-..."]}.
#
# For spark.worker.resource.gpu.discoveryScript (standalone) and spark.executor.resource.gpu.discoveryScript (YARN,
# Kubernetes). Addresses are UUIDs and not indexes: nvidia-smi counts by PCI bus, while CUDA counts by speed and only
# what CUDA_VISIBLE_DEVICES lists, so an index can mean another GPU to CUDA than it meant here. A GPU in MIG mode cannot
# be used as a whole: its MIG devices are offered in its place.
set -eu

fail() {
    echo "gpu_discovery.sh on $(uname -n): $1" >&2
    exit 1
}

command -v nvidia-smi > /dev/null 2>&1 || fail "nvidia-smi is not on PATH ($PATH): install the NVIDIA driver, or offer no GPUs here"
modes=$(nvidia-smi --query-gpu=uuid,mig.mode.current --format=csv,noheader 2>&1) || fail "nvidia-smi --query-gpu failed: $modes"
devices=$(nvidia-smi -L 2>&1) || fail "nvidia-smi -L failed: $devices"

# `modes` has lines "GPU-<uuid>, Enabled|Disabled|[N/A]"; `devices` has "GPU 0: <name> (UUID: GPU-<uuid>)" and, under a
# GPU in MIG mode, "  MIG 1g.5gb     Device  0: (UUID: MIG-<uuid>)".
addresses=$(printf '%s\n%s\n' "$modes" "$devices" | awk '
    function offer(uuid) { if (uuid != "") list = list (list == "" ? "" : ", ") "\"" uuid "\"" }
    /^GPU-.*, *Enabled *$/ { sub(/,.*/, ""); in_mig_mode[$0] = 1 }
    /\(UUID: / {
        part_of_gpu = /^ *MIG/
        sub(/.*\(UUID: /, ""); sub(/\).*/, "")
        if (part_of_gpu) { whole = ""; offer($0) }
        else { offer(whole); whole = ($0 in in_mig_mode) ? "" : $0 }
    }
    END { offer(whole); print list }')
[ -n "$addresses" ] || fail "nvidia-smi lists no GPU that can be used (a GPU in MIG mode needs MIG devices): $devices"
echo "{\"name\": \"gpu\", \"addresses\": [$addresses]}"
