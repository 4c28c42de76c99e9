# 2 x v6e-16: topology 4x4, 16 chips, 4 hosts, spot; tpu-v6e-slice, machine type ct6e-standard-4t
kubectl --context=c --namespace=default apply --filename=- <<'MANIFEST'
apiVersion: "jobset.x-k8s.io/v1alpha2"
kind: JobSet
metadata:
  name: "tiny-0123456789ab-0a1089"
  namespace: default
  labels:
    "kueue.x-k8s.io/queue-name": slm-queue
    slm-jax/launch: "0a10890ca0bf"
  annotations:
    "alpha.jobset.sigs.k8s.io/exclusive-topology": cloud.google.com/gke-nodepool
spec:
  ttlSecondsAfterFinished: 3600
  failurePolicy:
    maxRestarts: 20
    rules:
    - name: bug
      action: FailJobSet
      onJobFailureReasons:
      - PodFailurePolicy
  replicatedJobs:
  - name: slice
    replicas: 2
    template:
      spec:
        parallelism: 4
        completions: 4
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: main
              operator: In
              values:
              - 1
              - 2
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 60
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: "tpu-v6e-slice"
              cloud.google.com/gke-tpu-topology: "4x4"
              cloud.google.com/gke-spot: "true"
            tolerations:
            - key: google.com/tpu
              operator: Exists
            containers:
            - name: main
              image: "registry/slm_jax:1"
              command:
              - python
              args:
              - tiny
              - "--config.name=a b; rm -rf $HOME"
              - "--workdir=/mnt/slm/tiny"
              - "--arm=0123456789ab"
              securityContext:
                privileged: true
                runAsUser: 0
              resources:
                limits:
                  google.com/tpu: 4
              volumeMounts:
              - name: share
                mountPath: "/mnt/slm"
              - name: dshm
                mountPath: "/dev/shm"
            volumes:
            - name: share
              persistentVolumeClaim:
                claimName: slm
            - name: dshm
              emptyDir:
                medium: Memory
MANIFEST
# once done: tiny-0123456789ab
kubectl --context=c --namespace=default apply --filename=- <<'MANIFEST'
apiVersion: "jobset.x-k8s.io/v1alpha2"
kind: JobSet
metadata:
  name: "tiny-ba9876543210-0a1089"
  namespace: default
  labels:
    "kueue.x-k8s.io/queue-name": slm-queue
    slm-jax/launch: "0a10890ca0bf"
  annotations:
    "alpha.jobset.sigs.k8s.io/exclusive-topology": cloud.google.com/gke-nodepool
spec:
  ttlSecondsAfterFinished: 3600
  failurePolicy:
    maxRestarts: 20
    rules:
    - name: bug
      action: FailJobSet
      onJobFailureReasons:
      - PodFailurePolicy
  replicatedJobs:
  - name: slice
    replicas: 2
    template:
      spec:
        parallelism: 4
        completions: 4
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: main
              operator: In
              values:
              - 1
              - 2
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 60
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: "tpu-v6e-slice"
              cloud.google.com/gke-tpu-topology: "4x4"
              cloud.google.com/gke-spot: "true"
            tolerations:
            - key: google.com/tpu
              operator: Exists
            containers:
            - name: main
              image: "registry/slm_jax:1"
              command:
              - python
              args:
              - tiny
              - "--config.name=a b; rm -rf $HOME"
              - "--workdir=/mnt/slm/tiny"
              - "--arm=ba9876543210"
              securityContext:
                privileged: true
                runAsUser: 0
              resources:
                limits:
                  google.com/tpu: 4
              volumeMounts:
              - name: share
                mountPath: "/mnt/slm"
              - name: dshm
                mountPath: "/dev/shm"
            volumes:
            - name: share
              persistentVolumeClaim:
                claimName: slm
            - name: dshm
              emptyDir:
                medium: Memory
MANIFEST
