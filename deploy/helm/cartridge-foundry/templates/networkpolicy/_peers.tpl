{{/* The components that have pods in this release, by a map to true. */}}
{{- define "foundry.network.pods" -}}
gateway: true
rollout: true
teacher: true
trainer: true
{{- if .Values.redis.bundled.enabled }}
redis: true
{{- end }}
{{- if .Values.objects.bundled.enabled }}
objects: true
{{- end }}
{{- if eq (include "foundry.model.source" .) "cache" }}
model: true
{{- end }}
{{- if .Values.tests.enabled }}
test: true
{{- end }}
{{- end -}}

{{/* What `when` of a flow may name. */}}
{{- define "foundry.network.conditions" -}}
tests: {{ .Values.tests.enabled }}
jobs: {{ eq .Values.trainer.mode "jobs" }}
hub: {{ ne .Values.model.hub.id "" }}
otlp: {{ ne .Values.monitoring.otlpEndpoint "" }}
ranks: {{ ne (include "foundry.trainer.ranks" .) "" }}
{{- end -}}

{{/* Ports of a flow to something whose port the values decide. Takes root and name. */}}
{{- define "foundry.network.ports" -}}
{{- $values := .root.Values -}}
{{- $ports := list -}}
{{- if eq .name "redis" }}
{{- $ports = list (ternary "6379" (include "foundry.urlPort" (dict "url" $values.redis.url "default" "6379")) $values.redis.bundled.enabled) }}
{{- else if eq .name "objects" }}
{{- $default := ternary "80" "443" (hasPrefix "http:" $values.objects.endpoint) }}
{{- $ports = list (ternary "8333" (include "foundry.urlPort" (dict "url" $values.objects.endpoint "default" $default)) $values.objects.bundled.enabled) }}
{{- else if eq .name "hub" }}
{{- $default := ternary "80" "443" (hasPrefix "http:" $values.model.hub.endpoint) }}
{{- $ports = list (include "foundry.urlPort" (dict "url" $values.model.hub.endpoint "default" $default)) }}
{{- else if eq .name "otlp" }}
{{- $ports = list (include "foundry.urlPort" (dict "url" $values.monitoring.otlpEndpoint "default" "4317")) }}
{{- else if eq .name "kube-api" }}
{{- $ports = $values.networkPolicy.kubeAPI.ports }}
{{- else if eq .name "dns" }}
{{- $ports = list 53 }}
- {port: 53, protocol: UDP}
{{- end -}}
{{- range $ports }}
- {port: {{ . }}, protocol: TCP}
{{- end }}
{{- end -}}

{{/* NetworkPolicy peers; nothing stands for everywhere. Takes root and name. */}}
{{- define "foundry.network.peers" -}}
{{- if hasKey (include "foundry.network.pods" .root | fromYaml) .name -}}
- podSelector:
    matchLabels:
      {{- include "foundry.selectorLabels" . | nindent 6 }}
{{- else -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- with index (merge (dict "kube-api" $policy.kubeAPI.to) $policy) .name }}
{{- toYaml . }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* One rule. Takes root, flow and side (from or to). A flow without ports is for all of them. */}}
{{- define "foundry.network.rule" -}}
{{- $rule := dict -}}
{{- if .flow.port }}
{{- $_ := set $rule "ports" (list (dict "port" .flow.port "protocol" "TCP")) }}
{{- else if include "foundry.network.ports" (dict "root" .root "name" .flow.to) | trim }}
{{- $_ := set $rule "ports" (include "foundry.network.ports" (dict "root" .root "name" .flow.to) | fromYamlArray) }}
{{- end }}
{{- with include "foundry.network.peers" (dict "root" .root "name" (get .flow .side)) }}
{{- $_ := set $rule $.side (. | fromYamlArray) }}
{{- end }}
{{- list $rule | toYaml }}
{{- end -}}
