{{/* Scaling by what waits. Takes root, name and query (the default of the KEDA trigger). */}}
{{- define "foundry.autoscaling" -}}
{{- $values := index .root.Values .name -}}
{{- if and $values.autoscaling.enabled $values.keda.enabled }}
{{- fail (printf "%s.autoscaling.enabled and %s.keda.enabled: enable one, both would set the number of pods" .name .name) }}
{{- end }}
{{- if $values.autoscaling.enabled }}
{{- include "foundry.horizontalPodAutoscaler" . }}
{{- else if $values.keda.enabled }}
{{- include "foundry.scaledObject" . }}
{{- end }}
{{- end -}}

{{- define "foundry.horizontalPodAutoscaler" -}}
{{- with (index .root.Values .name).autoscaling -}}
{{- if not (or .metric.name .targetCPUUtilizationPercentage) }}
{{- fail (printf "%s.autoscaling: set metric.name or targetCPUUtilizationPercentage" $.name) }}
{{- end -}}
apiVersion: {{ ternary "autoscaling/v2" "autoscaling/v2beta2" (semverCompare ">=1.23-0" $.root.Capabilities.KubeVersion.Version) }}
kind: HorizontalPodAutoscaler
metadata:
  name: {{ include "foundry.name" $ }}
  namespace: {{ $.root.Release.Namespace }}
  labels:
    {{- include "foundry.labels" $ | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ include "foundry.name" $ }}}
  minReplicas: {{ .minReplicas }}
  maxReplicas: {{ .maxReplicas }}
  metrics:
    {{- with .metric.name }}
    - type: Pods
      pods:
        metric: {name: {{ . | quote }}}
        target: {type: AverageValue, averageValue: {{ (index $.root.Values $.name).autoscaling.metric.targetAverageValue | quote }}}
    {{- end }}
    {{- if .targetCPUUtilizationPercentage }}
    - type: Resource
      resource:
        name: cpu
        target: {type: Utilization, averageUtilization: {{ .targetCPUUtilizationPercentage }}}
    {{- end }}
  {{- with .behavior }}
  behavior:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "foundry.scaledObject" -}}
{{- with (index .root.Values .name).keda -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ include "foundry.name" $ }}
  namespace: {{ $.root.Release.Namespace }}
  labels:
    {{- include "foundry.labels" $ | nindent 4 }}
spec:
  scaleTargetRef: {name: {{ include "foundry.name" $ }}}
  minReplicaCount: {{ .minReplicas }}
  maxReplicaCount: {{ .maxReplicas }}
  pollingInterval: {{ .pollingIntervalSeconds }}
  cooldownPeriod: {{ .cooldownPeriodSeconds }}
  triggers:
    - type: prometheus
      metadata:
        serverAddress: {{ required (printf "%s.keda.serverAddress: give the URL of Prometheus" $.name) .serverAddress }}
        query: {{ .query | default $.query | quote }}
        threshold: {{ .threshold | quote }}
{{- end }}
{{- end -}}
