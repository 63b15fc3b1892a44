#!/usr/bin/env bash
# Everything that only a GPU can show, in one call; needs the package and its dependencies importable.
#   bash benchmarks/gpu.sh OUT_FOLDER
# 1. speed and compile ratios in benchmarks/speed.py's table; 2. the six families at equal training FLOPs in bf16 on
# real Python text (site-packages, or the files given in TEXT); 3. four trials at once on one GPU through Ray, against
# one at a time.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?folder for the results}
mkdir -p "$out"
python=${PYTHON:-python3}
text=${TEXT:-$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/**/*.py}
nvidia-smi --query-gpu=name,memory.total --format=csv > "$out/gpu.txt"
$python benchmarks/speed.py --device cuda --out "$out/speed_gpu.json" > "$out/speed_gpu.txt" 2>&1
$python benchmarks/families.py --device cuda --width 512 --seq-len 1024 --batch-tokens 65536 --lr 2e-3 \
  --flops "${FLOPS:-2e16}" --seeds "${SEEDS:-1}" --data "$text" --out "$out/families_gpu.json" > "$out/families_gpu.txt" 2>&1
for at_once in 1 4; do
  share=$($python -c "print(1 / $at_once)")
  /usr/bin/env time -p $python -m studies.cli search quickstart training.flops=4e12 training.batch_tokens=16384 \
    search.num_trials=8 search.stopper=none "resources.gpus_per_trial=$share" --dir "$out/run-$at_once" \
    > "$out/search_$at_once.txt" 2>&1
done
