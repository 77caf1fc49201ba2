#!/usr/bin/env bash
# All that waits for a GPU, in parts of less than nine minutes; call it again until it exits with 0.
#
#   PHOTOS=posed/ bash benchmarks/gpu_day.sh [OUT]         OUT: folder of results, default gpu_day
#   DEVICE=cpu bash benchmarks/gpu_day.sh /tmp/rehearsal   small sizes, a few minutes, no figures
#
# PHOTOS: posed photos with tracks to train on; without, only the training is left out.
# ROOMS: folder of `ffrecon-train views`; without, rooms are rendered into OUT/rooms.
# HELD_OUT: scenes of PHOTOS that are only looked at, separated by commas. STEPS: of the training.
# LIMIT: seconds of a part. PYTHON: the interpreter.
#
# A part writes OUT/NAME.json when it is done and is skipped from then on. One that the limit
# stopped goes on where it was with the next call; one that fails does not keep the others from
# running. The exit code is 1 while a part is not done.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
DEVICE=${DEVICE:-cuda}
LIMIT=${LIMIT:-540}
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${1:-gpu_day}")
mkdir -p "$OUT"

if [ "$DEVICE" = cpu ]; then  # a rehearsal
    ATTENTION=(--model vggt-tiny --size 56x42 --views 4 8)
    UPDATE=(--model vggt-tiny --size 56x42 --views 4)
    PIECES=(--model vggt-tiny tiny-ttt --images 8 --window 6 --size 128x96)
    THROUGHPUT=(--batches 1 --repeats 1 --views-per-step 4)
    TRAINING=(--steps "${STEPS:-2}" --views-per-step 4 --save-every 1)
    RENDERED=(--count 1 --held-out 1)
    if [ -z "${PHOTOS:-}" ]; then
        "$PYTHON" -m benchmarks.rendered_photos "$OUT/rendered" --scenes 1
        PHOTOS=$OUT/rendered/photos
    fi
else
    ATTENTION=(--model vggt-1b --size 518x392 --views 50 100 200 400 700 1000)
    UPDATE=(--model vggt-1b --size 518x392 --views 100 1000 --compile)
    PIECES=(--model vggt vgg-t3 --images 64)
    THROUGHPUT=(--batches 16)
    TRAINING=(--steps "${STEPS:-6000}" --save-every 50)
    RENDERED=(--count 150)
fi

TRAIN=("$PYTHON" -c 'import sys; from feedforward_recon.training.cli import main; sys.exit(main())')
ROOMS=${ROOMS:-$OUT/rooms}
unfinished=()

# part NAME COMMAND...: a command that writes OUT/NAME.partial.json, or files of its own.
part() {
    local name=$1 began=$SECONDS status=0
    shift
    if [ -e "$OUT/$name.json" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name"
    timeout --kill-after=10 "$LIMIT" "$@" || status=$?
    if [ $status = 0 ]; then
        [ -e "$OUT/$name.partial.json" ] ||
            echo "{\"part\": \"$name\", \"seconds\": $((SECONDS - began))}" > "$OUT/$name.partial.json"
        mv "$OUT/$name.partial.json" "$OUT/$name.json"
        echo "== $name: done in $((SECONDS - began)) s"
        return
    fi
    case $status in
        3 | 124) echo "== $name: the time is over, the next call goes on" ;;
        *) echo "== $name: failed with exit code $status" ;;
    esac
    unfinished+=("$name")
}

# bench PART MODULE OPTIONS...: a benchmark that writes one file.
bench() {
    local name=$1 module=$2
    shift 2
    part "$name" "$PYTHON" -m "benchmarks.$module" --device "$DEVICE" \
        --out "$OUT/$name.partial.json" "$@"
}

for variant in ttt sparse; do
    bench attention_$variant attention_gpu "${ATTENTION[@]}" --variants $variant \
        --limit-s $((LIMIT - 40))
done
# The last points take minutes each: what may end too late is left for the next call.
bench attention_softmax attention_gpu "${ATTENTION[@]}" --variants softmax --sdpa flash \
    --limit-s $((LIMIT - 40))
bench update attention_gpu --update "${UPDATE[@]}"
bench pieces network_pieces "${PIECES[@]}"
if [ -n "${PHOTOS:-}" ]; then
    [ -d "$ROOMS" ] && [ ! -d "$OUT/rooms" ] ||
        part rooms "${TRAIN[@]}" views --out "$ROOMS" --device "$DEVICE" "${RENDERED[@]}"
    bench throughput training_throughput --photos "$PHOTOS" --rooms "$ROOMS" "${THROUGHPUT[@]}"
    part training "${TRAIN[@]}" transformer --photos "$PHOTOS" --rooms "$ROOMS" \
        --held-out "${HELD_OUT:-}" --device "$DEVICE" --out "$OUT/training" "${TRAINING[@]}"
else
    echo '== training: left out, PHOTOS names no folder'
fi
"$PYTHON" -m benchmarks.gpu_goals "$OUT" || unfinished+=(goals)

if [ ${#unfinished[@]} -gt 0 ]; then
    echo "not done: ${unfinished[*]}; call this again"
    exit 1
fi
echo "all parts are done: $OUT"
