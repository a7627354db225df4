{{/* The Job of one run, as far as it is the same for all: the gateway adds its name, owner and `--run RUN_ID`. */}}
{{- define "foundry.trainer.job" -}}
{{- $ctx := dict "root" . "name" "trainer" "job" true -}}
{{- $job := .Values.trainer.job -}}
apiVersion: batch/v1
kind: Job
metadata:
  generateName: {{ include "foundry.fullname" . }}-run-
  labels:
    {{- include "foundry.labels" $ctx | nindent 4 }}
  {{- with $job.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  backoffLimit: {{ $job.backoffLimit }}
  ttlSecondsAfterFinished: {{ $job.ttlSecondsAfterFinished }}
  {{- with $job.activeDeadlineSeconds }}
  activeDeadlineSeconds: {{ . }}
  {{- end }}
  {{- if semverCompare ">=1.26-0" .Capabilities.KubeVersion.Version }}
  podFailurePolicy:
    rules:
      # The run failed and its record says why: another attempt would fail too.
      - action: FailJob
        onExitCodes: {containerName: trainer, operator: In, values: [3]}
      # Evicted or preempted: no fault of the run.
      - action: Ignore
        onPodConditions: [{type: DisruptionTarget, status: "True"}]
  {{- end }}
  template:
    {{- include "foundry.podTemplate" $ctx | nindent 4 }}
{{- end -}}
