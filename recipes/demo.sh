#!/usr/bin/env bash
# The demo trains every kind of model from scratch on a CPU, on data that come with packages, and shows what came out:
#
#   bash recipes/demo.sh                # all parts
#   bash recipes/demo.sh image text     # some of: image audio text multimodal
#
#   image        captioned scenes -> VAE-GAN -> text to image
#   audio        the captions, spoken -> vocoder -> VAE-GAN -> text to speech
#   text         Python's help texts -> language model
#   multimodal   latents of the scenes and of all captions, spoken -> one transformer that draws, describes, speaks and
#                transcribes; runs image and audio first, which make the latents
#
# runs/demo/report.html is one page with everything. A second call goes on where an interrupted one stopped; of a
# complete demo it makes the report alone. Evaluations run beside what comes next. SHORTER=10 divides the numbers of
# training steps by 10 and evaluates fewer samples; a call without it then begins anew, and keeps the short runs as
# demo_former_1.
# It takes about 26 minutes after the installation on 2 cores (49 CPU minutes). The VAE reaches 26 dB PSNR, 97 % of the
# generated images match their held-out caption (a probe ranks it first of 72), the vocoder has PESQ-wb 2.85, speech is
# understood about as well as the recordings are, and the transformer describes and transcribes nearly every caption.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/heading.sh
cores=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN) # macOS has no nproc
ALONE="${OMP_NUM_THREADS:-$cores}" # threads of a process that is alone; two train at once
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}"

wanted=" ${*:-image audio text multimodal} "
for part in $wanted; do
    if [ ! -f "recipes/demo/$part.sh" ] || [ "$part" = steps ]; then
        echo "unknown part $part; known: image audio text multimodal" >&2
        exit 2
    fi
done
case $wanted in *" multimodal "*) wanted=" image audio$wanted" ;; esac
. recipes/demo/steps.sh
for part in image audio text multimodal; do
    case $wanted in *" $part "*) . "recipes/demo/$part.sh" ;; esac
done
meet

heading "Report"
python inference/report.py --run_names demo demo_text
next "open runs/demo/report.html in a browser"
