# Settings of a site: the one file to edit here. It is read before sbatch (by `lightning_prune submit`, or by you:
# `source slurm/env.sh`), where the SBATCH_ variables count, and again inside every job, where the rest does.
# Keep it elsewhere if you like, and name it in LIGHTNING_PRUNE_ENV or with `submit --env`.

# Where jobs go. An SBATCH_ variable stands for the option of that name: man sbatch, "INPUT ENVIRONMENT VARIABLES".
# export SBATCH_ACCOUNT=my-project SBATCH_PARTITION=gpu SBATCH_QOS=preemptible

# The software, found from the folder that the job was submitted in.
# module load python/3.11
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi
LIGHTNING_PRUNE=(lightning_prune)

# Compute nodes reach no hub: weights and data are in place before (Inception by lightning_prune prefetch).
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# export NCCL_SOCKET_IFNAME=ib0
# export LIGHTNING_PRUNE_CACHE=/shared/cache/lightning_prune

# Keys stay out of job scripts: `wandb login` once, and `--run.wandb online` where nodes may reach the server.
