#!/usr/bin/env bash
# From nothing to measured reconstructions in minutes, on a CPU: embedded pictograms -> cache -> VAE-GAN -> metrics and a sheet.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"

python -m dataset_loading.embedded data/openmoji --image_size 128
python preprocess_image_vae_dataset.py --dataset_name data/openmoji/train --validation_dataset data/openmoji/test \
    --image_size 64 --output_dir cached_datasets/openmoji_64
