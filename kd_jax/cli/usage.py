"""What `kd-jax --help` prints.

Owns the text alone; which flags there really are is in `flags`.
"""

USAGE = """\
kd-jax: a large model into a small fast one, in JAX.

  kd-jax run      --config FILE --workdir DIR   train a teacher, distil a
                  student, prune and quantize it, export and report
  kd-jax compare  --config FILE --workdir DIR   train one student with every
                  method of distillation and several seeds, and tabulate
  kd-jax compress --model PATH --recipe FILE --budget SIZE --workdir DIR
                  find and train the best small form of a trained network
                  within a size, FLOPs or a latency
  kd-jax cache-teacher --config FILE --workdir DIR
                  store what the run's teacher says of every image in every
                  epoch, to train students without running it
  kd-jax evaluate --workdir DIR [--split SPLIT] measure what a run made
  kd-jax shrink   --workdir DIR --sparsity X    remove channels and heads of a
                  trained student, and print what can leave and what it costs
  kd-jax report   --workdir DIR                 print the report of a run
  kd-jax launch   tpu-vm | queued | gke | xpk --config FILE
                  --workdir gs://BUCKET/DIR --name NAME and the flags of the
                  place: run on a Cloud TPU: create, install on all workers,
                  start, follow the log, start again after preemption, delete
  kd-jax plan     --config FILE [--topology v5e:16x16]
                  compile a train step for a TPU that need not be there, and
                  print what it holds, does, sends and how long that takes

run, compare, cache-teacher and launch:
  --config FILE[:VARIANT] a configuration such as configs/digits.py; ':tiny'
                          is small and learns little, the file says what other
                          variants it has; or one stored as JSON, which is
                          read and not executed
  --config.KEY=VALUE      changes one field, such as --config.seed=1

--workdir DIR, also gs://BUCKET/DIR, is
  of run, compare, compress and cache-teacher:
                          where everything is written; the same command
                          continues what was stopped, and run goes on with
                          --workdir alone
  of evaluate, shrink and report:
                          that of a kd-jax run, which is read; what shrink and
                          report make is written there
  of launch:              that of the run, in a bucket

run, compare, compress and cache-teacher, also with several processes, of which
the cluster tells on Cloud TPU and under SLURM and Open MPI (5: with mpi4py);
all need to share the --workdir:
  --coordinator HOST:PORT where process 0 listens; :PORT is 127.0.0.1
  --num_processes N       how many there are
  --process_id I          which one this is, from 0
  --initialization_timeout SECONDS
                          how long to wait for all of them, 300 (default)
  --heartbeat_timeout SECONDS
                          when one that died ends the others, 100 (default)
  --compile_cache DIR     where each keeps compiled programs for later; off for
                          nowhere; by default JAX_COMPILATION_CACHE_DIR or
                          ~/.cache/kd_jax/compiled

run:
  --stages A,B            only these of: teacher, alone, distill, compress,
                          convert, export, report
  --overwrite             runs the stages again; deletes what depends on them
  --profile               measures how long the devices wait for data, prints
                          it, and writes a trace to <stage>/profile

cache-teacher:
  --out DIR               where to, WORKDIR/teacher_cache by default; then
                          train with --config.teacher.cache=DIR
  --dtype NAME            float16 (default), bfloat16 or float32
  --top_k K               keep the K largest outputs only, for the terms top_k
                          and hard_distillation; 0 (default) for all
  --features              keep the features that the terms read, too
  --epochs N              0 (default) for those of the longest training
  --overwrite             replaces what is there

compress:
  --model PATH            a work directory of kd-jax run, also gs://BUCKET/DIR,
                          or a safetensors file of the network that
                          --recipe.student.model names
  --recipe FILE           a configuration such as configs/compress.py;
                          --recipe.KEY=VALUE changes one field; data, student
                          and seed are those of a work directory
  --budget LIMIT          such as '20 KB', '1.5 MFLOP' or '0.4 ms'
  --stage STAGE           of a work directory: distill (default) or alone

evaluate, shrink and report:
  --config FILE           that of the run, where it registers something of your
                          own, such as a model; its fields are not read again

evaluate:
  --split SPLIT           train, validation or test (default)

shrink:
  --sparsity X            share of the units that leave, 0.5 (default)
  --structure NAME        what the units are: neurons (default), which are
                          channels and heads, or residual_blocks
  --stage STAGE           the student of distill (default) or alone
  --scope SCOPE           global (default): one ranking of all units; layer:
                          one in each group
  --keep A,B              patterns of groups and parameters that stay
  --multiple_of N         rounds the channels that a group keeps up
  --overwrite             replaces a smaller student made before

launch:
  tpu-vm, queued          a TPU VM, at once or as a queued resource
  gke, xpk                writes a workload file for Kubernetes, or prints what
                          to tell xpk; nothing is started
launch, in all places:
  --name NAME             of the run and of what is created for it
  --accelerator TYPE      such as v6e-8 or v5litepod-16
  --restarts N            after preemptions, 100 (default)
  --dry_run               prints all files and commands, a shell script
launch, by place:
  --zone ZONE             tpu-vm, queued, xpk: such as us-central1-a
  --project NAME          tpu-vm, queued, xpk: of Google Cloud; that of gcloud
                          (default)
  --spot                  tpu-vm, queued, gke: cheaper, and preempted at times
  --runtime NAME          tpu-vm, queued: the software of the machine; that of
                          the type (default)
  --package SOURCE        tpu-vm, queued: what all workers install:
                          kd_jax==VERSION, a URL, a wheel, or a directory; what
                          runs here (default)
  --keep                  tpu-vm, queued: does not delete the machine at the end
  --image IMAGE           gke, xpk: the container
  --cluster CLUSTER       xpk: its cluster

plan:
  --config FILE           as for run; --config.KEY=VALUE too
  --topology NAME         chip and shape, such as v5e:16x16 or v5p:4x4x8, with
                          the extra [tpu]; the devices of this machine if empty
  --stage STAGE           teacher, alone, distill (default) or compress
  --what_if A,B           cached_teacher, fsdp, remat, double_batch (all by
                          default), or none; each is compiled
  --estimate              estimates these instead
  --measure               also runs the step on random images; no --topology
  --examples N            images of the train split, if they are not known
  --json PATH             writes the numbers; --overwrite replaces the file

all:
  --debug                 shows the traceback of an error

kd-jax --version prints the version of kd_jax.

The exit code is 0; 2 after an error, which is said in one sentence; 75 when a
signal stopped it and the same command goes on; of launch also that of the run,
and 130 when it was interrupted.
"""
