#!/usr/bin/env bash
# Checks and times everything on a machine with an NVIDIA GPU, without a network, in one call of under 10 minutes.
#
#   bench/gpu_check.sh                        all stages
#   bench/gpu_check.sh --stage tests,graph    some of them
#   bench/gpu_check.sh --dry-run              the plan, on any machine
#
#   build      compiles the extensions in the source tree; prebuilt .abi3.so files are used where that fails
#   tests      the test files that take a device, on the GPU
#   configs    every pinned kernel configuration of this GPU's architecture against float64
#   sanitizer  compute-sanitizer (memcheck, synccheck, racecheck) on small cases
#   repeat     the same call many times, alone and beside other work: the same bits
#   graph      CUDA-graph capture and replay of the steps, the scan, decode attention and the forward
#   bench      compiles of a fresh process and host cost of a call, then the registry: bench/run.py --device cuda
#
# PYTHON=python3            needs torch with CUDA, triton and pytest; nothing is installed
# OUT=bench/results/<gpu>   from the repository root; gets log.txt, summary.json, info.json, checks.json, bench.json and
#                           tests.xml as the stages end
#
# A failed or overlong stage does not stop the next. Exit status 0 only if every stage passed; 2 without a GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
BUDGET=570 # seconds for everything; a stage gets its limit or what is left
declare -A LIMIT=([build]=150 [tests]=150 [configs]=90 [sanitizer]=120 [repeat]=40 [graph]=40 [bench]=180)
ALL=(build tests configs sanitizer repeat graph bench)
STAGES=("${ALL[@]}")
DRY=

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

while (($#)); do
  case $1 in
    --stage) IFS=, read -ra STAGES <<<"${2:?--stage needs names, of: ${ALL[*]}}"; shift ;;
    --stage=*) IFS=, read -ra STAGES <<<"${1#*=}" ;;
    --dry-run) DRY=1 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu_check: unknown argument $1; see --help"; exit 64 ;;
  esac
  shift
done
for stage in "${STAGES[@]}"; do
  [[ -n ${LIMIT[$stage]:-} ]] || { echo "gpu_check: no stage $stage; allowed: ${ALL[*]}"; exit 64; }
done

export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
checks() { "$PYTHON" -m bench.gpu.checks "$@"; }

build() {
  "$PYTHON" setup.py -q build_ext --inplace || echo "the build failed; going on with what python/memattn has"
  "$PYTHON" -m memattn info --json >"$OUT/info.json" && "$PYTHON" -m memattn info --check && checks loaded
}

tests() {
  local files
  mapfile -t files < <(grep -lE 'def [a-z_]+\([^)]*\bdevice\b' tests/test_*.py)
  "$PYTHON" -m pytest -p no:xdist -p no:cacheprovider -q --device cuda --junitxml="$OUT/tests.xml" "${files[@]}"
}

configs() { checks configs --json "$OUT/checks.json"; }
repeat() { checks repeat --json "$OUT/checks.json"; }
graph() { checks graph --json "$OUT/checks.json"; }

sanitizer() {
  local tool status=0
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH"; return 1; }
  for tool in memcheck synccheck racecheck; do
    echo "-- $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUDA_LAUNCH_BLOCKING=1 timeout -k 5 60 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m bench.gpu.checks small ||
      { echo "$tool: status $?"; status=1; }
  done
  return $status
}

bench() {
  local status=0
  "$PYTHON" -m bench.gpu.first_call --json "$OUT/checks.json" || status=1
  "$PYTHON" bench/run.py --device cuda --mode step,fwd,fwdbwd --dtype bfloat16 --backend all --seconds 0.3 \
    --json "$OUT/bench.json" || status=1
  return $status
}

if [[ $DRY ]]; then
  echo "$PYTHON, results in ${OUT:-bench/results/<gpu>}, at most $BUDGET s in all"
  for stage in "${STAGES[@]}"; do
    echo "== $stage, at most ${LIMIT[$stage]} s"
    declare -f "$stage" | sed '1,2d;$d;s/^    //'
  done
  exit 0
fi

GPU=$("$PYTHON" -c 'import re, torch; assert torch.cuda.is_available()
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()))' 2>/dev/null) || {
  echo "gpu_check: $PYTHON sees no CUDA GPU (torch.cuda.is_available() is false, or there is no torch); nothing was run"
  exit 2
}
export OUT=${OUT:-bench/results/$GPU}
mkdir -p "$OUT"
LOG=$OUT/log.txt
: >"$LOG"
{ date -u +%FT%TZ; git rev-parse HEAD 2>/dev/null; nvidia-smi; } >>"$LOG" 2>&1

# A stage runs in its own shell under `timeout`, which ends everything that the stage started.
export -f checks build tests configs sanitizer repeat graph bench
export PYTHON
SECONDS=0
failed=0
rows=
for stage in "${STAGES[@]}"; do
  left=$((BUDGET - SECONDS))
  limit=$((LIMIT[$stage] < left ? LIMIT[$stage] : left))
  echo "== $stage (at most $limit s)" | tee -a "$LOG"
  began=$SECONDS
  if ((limit > 5)); then
    timeout -k 10 "$limit" bash -c "$stage" >>"$LOG" 2>&1
    status=$?
  else
    status=124
  fi
  case $status in 0) word=passed ;; 124 | 137) word="out of time" ;; *) word="failed" ;; esac
  ((status)) && failed=1 && tail -n 15 "$LOG" | sed 's/^/   | /'
  echo "== $stage: $word after $((SECONDS - began)) s" | tee -a "$LOG"
  rows+="${rows:+, }{\"stage\": \"$stage\", \"result\": \"$word\", \"status\": $status, \"seconds\": $((SECONDS - began))}"
  printf '{"gpu": "%s", "seconds": %d, "stages": [%s]}\n' "$GPU" "$SECONDS" "$rows" >"$OUT/summary.json"
done
echo "results in $OUT"
exit $failed
