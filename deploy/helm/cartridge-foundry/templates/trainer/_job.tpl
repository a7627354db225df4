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
      # It ended because another pod of the run did.
      - action: Ignore
        onExitCodes: {containerName: trainer, operator: In, values: [4]}
      # Evicted or preempted: no fault of the run.
      - action: Ignore
        onPodConditions: [{type: DisruptionTarget, status: "True"}]
  {{- end }}
  template:
    {{- include "foundry.podTemplate" $ctx | nindent 4 }}
{{- end -}}

{{/* The name under which the pods of one run find each other; nothing where a run has one pod. */}}
{{- define "foundry.trainer.ranks" -}}
{{- if and (eq .Values.trainer.mode "jobs") (gt (int (dig "jobs" "max_nodes" 1 .Values.gateway.settings)) 1) -}}
{{ include "foundry.name" (dict "root" . "name" "ranks") }}
{{- end -}}
{{- end -}}
