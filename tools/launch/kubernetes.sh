#!/usr/bin/env bash
# A run on Kubernetes as a JobSet; needs kubectl, and JobSet in the cluster.
#
#   export NAME=xl HOSTS=4 IMAGE=registry.example/me/fat5_jax:1 CLAIM=models
#   export RESOURCE=nvidia.com/gpu COUNT=8      # or google.com/tpu, 4
#   tools/launch/kubernetes.sh create    # JobSet in the cluster, once
#   tools/launch/kubernetes.sh install   # builds this checkout into IMAGE
#   tools/launch/kubernetes.sh run --gin_file=recipes/glue.gin \
#     --gin.MODEL_DIR=/data/run ...
#   tools/launch/kubernetes.sh logs      # of host 0; HOST=3 for another
#   tools/launch/kubernetes.sh stop      # SIGTERM to host 0: all save and stop
#   tools/launch/kubernetes.sh delete
#
# tools/launch/kubernetes.sh --print ACTION prints the commands instead. CLAIM is
# a ReadWriteMany volume claim that all hosts see at /data. For TPUs on GKE,
# SELECTOR='{cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice,
# cloud.google.com/gke-tpu-topology: 4x4}' and EXTRA=tpu. A host that is lost
# restarts all, RESTARTS times (10); the run goes on from its last checkpoint.
# JOBSET is the manifest of JobSet to install.

set -euo pipefail
source "$(dirname "$0")/common.sh"
: "${NAME:?set NAME}"
HOSTS=${HOSTS:-1}
COMMAND=${COMMAND:-train}

manifest() {
  cat << END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-10}
  replicatedJobs:
  - name: hosts
    replicas: 1
    template:
      spec:
        parallelism: $HOSTS
        completions: $HOSTS
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            # Time to save after SIGTERM.
            terminationGracePeriodSeconds: 600
            nodeSelector: ${SELECTOR:-{\}}
            containers:
            - name: fat5-jax
              image: ${IMAGE:?set IMAGE}
              command: [python, -m, fat5_jax.$COMMAND]
              args:
              - --coordinator_address=$NAME-hosts-0-0.$NAME:8476
              - --process_count=$HOSTS
              - --process_index=\$(JOB_COMPLETION_INDEX)
$(for argument in "$@"; do printf '              - %s\n' "$(json "$argument")"; done)
              resources:
                limits: {${RESOURCE:-nvidia.com/gpu}: ${COUNT:-8}}
              volumeMounts:
              - {name: data, mountPath: /data}
              - {name: shm, mountPath: /dev/shm}
            volumes:
            - name: data
              persistentVolumeClaim: {claimName: ${CLAIM:?set CLAIM}}
            - name: shm
              emptyDir: {medium: Memory}
END
}

json() { python3 -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$1"; }

pod() {
  echo "jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=${HOST:-0}"
}

case $ACTION in
  create) run kubectl apply --server-side -f "${JOBSET:?set JOBSET}" ;;
  install)
    recipe=${TMPDIR:-/tmp}/fat5_jax.dockerfile
    write "$recipe" << END
FROM python:3.12-slim
COPY . /fat5_jax
RUN pip install --no-cache-dir "/fat5_jax[${EXTRA:-gpu}]"
WORKDIR /data
END
    run docker build --file "$recipe" --tag "${IMAGE:?set IMAGE}" "$ROOT"
    run docker push "$IMAGE"
    ;;
  run)
    manifest "$@" | write "$NAME.yaml"
    run kubectl apply -f "$NAME.yaml"
    ;;
  logs) run kubectl logs --follow --tail=100 -l "$(pod)" ;;
  stop)
    name='$(kubectl get pods -o name -l '"$(pod)"')'
    run bash -c "kubectl exec $name -- kill -TERM 1"
    ;;
  delete) run kubectl delete jobset "$NAME" ;;
  *) die "no action $ACTION; --help tells them" ;;
esac
