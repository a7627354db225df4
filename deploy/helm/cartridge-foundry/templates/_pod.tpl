{{/* The pod of a service. Takes root, name and job (whether a Job runs it). */}}
{{- define "foundry.podTemplate" -}}
{{- $root := .root -}}
{{- $values := index $root.Values .name -}}
{{- $service := index (include "foundry.services" $root | fromYaml) .name -}}
{{- $keys := and (eq .name "gateway") $root.Values.gateway.apiKeys.enabled -}}
{{- $calls := and (eq .name "gateway") (eq $root.Values.trainer.mode "jobs") -}}
metadata:
  labels:
    {{- include "foundry.selectorLabels" . | nindent 4 }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- if or $service.store $values.podAnnotations }}
  annotations:
    {{- if $service.store }}
    {{- /* Of the values, not of the Secrets: a random password is another one each time it is rendered without a cluster. */}}
    checksum/store: {{ list $root.Values.redis.auth $root.Values.redis.tls $root.Values.objects.auth $root.Values.store.signing | toJson | sha256sum }}
    {{- end }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
spec:
  serviceAccountName: {{ include "foundry.serviceAccountName" . }}
  automountServiceAccountToken: {{ $calls }}
  {{- /* Their variables would start with FOUNDRY_ in a release of that name. */}}
  enableServiceLinks: false
  {{- if .job }}
  restartPolicy: Never
  {{- with include "foundry.trainer.ranks" $root }}
  subdomain: {{ . }}
  {{- end }}
  {{- end }}
  terminationGracePeriodSeconds: {{ include "foundry.terminationGracePeriodSeconds" $values }}
  securityContext:
    {{- include "foundry.podSecurityContext" $root | nindent 4 }}
  {{- with include "foundry.scheduling" (dict "root" $root "name" .name "values" $values) }}
  {{- . | trim | nindent 2 }}
  {{- end }}
  {{- if $service.model }}
  {{- with include "foundry.model.initContainer" . }}
  initContainers:
    {{- . | nindent 4 }}
  {{- end }}
  {{- end }}
  containers:
    - name: {{ .name }}
      image: {{ include "foundry.serviceImage" . }}
      imagePullPolicy: {{ $root.Values.global.image.pullPolicy }}
      env:
        {{- include "foundry.env" . | trim | nindent 8 }}
      ports:
        - {name: {{ $service.portName }}, containerPort: {{ $service.port }}, protocol: TCP}
        - {name: metrics, containerPort: 9090, protocol: TCP}
        {{- if and .job (include "foundry.trainer.ranks" $root) }}
        - {name: rendezvous, containerPort: 29500, protocol: TCP}
        {{- end }}
      {{- include "foundry.probes" . | trim | nindent 6 }}
      {{- if eq .name "rollout" }}
      lifecycle:
        preStop:
          exec: {command: [sh, -c, {{ include "foundry.drainCommand" $values | quote }}]}
      {{- else if gt (int $values.preStopSeconds) 0 }}
      lifecycle:
        preStop:
          exec: {command: [sleep, {{ $values.preStopSeconds | quote }}]}
      {{- end }}
      securityContext:
        {{- include "foundry.containerSecurityContext" $root | nindent 8 }}
      resources:
        {{- include "foundry.resources" $values | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- if $service.model }}
        - {name: shm, mountPath: /dev/shm}
        {{- include "foundry.model.volumeMount" $root | nindent 8 }}
        {{- end }}
        {{- if $service.store }}
        {{- include "foundry.store.volumeMounts" $root | trim | nindent 8 }}
        {{- end }}
        {{- if $root.Values.rpc.tokens.enabled }}
        - {name: rpc-tokens, mountPath: /run/secrets/foundry/rpc, readOnly: true}
        {{- end }}
        {{- if $keys }}
        - {name: api-key, mountPath: /run/secrets/foundry/api-key, readOnly: true}
        {{- end }}
        {{- if $root.Values.tls.enabled }}
        - {name: tls, mountPath: /etc/foundry/tls, readOnly: true}
        {{- end }}
        {{- if and (eq .name "gateway") $values.https.existingSecret }}
        - {name: https, mountPath: /etc/foundry/https, readOnly: true}
        {{- end }}
        {{- with $values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ $values.tmpSize }}}
    {{- if $service.model }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $values.shmSize }}}
    {{- include "foundry.model.volume" $root | nindent 4 }}
    {{- end }}
    {{- if $service.store }}
    {{- include "foundry.store.volumes" $root | trim | nindent 4 }}
    {{- end }}
    {{- if $root.Values.rpc.tokens.enabled }}
    - name: rpc-tokens
      secret:
        secretName: {{ include "foundry.rpc.secretName" $root }}
        items:
          {{- range splitList " " (include "foundry.rpc.roles" .) }}
          - {key: {{ . }}, path: {{ . }}}
          {{- end }}
    {{- end }}
    {{- if $keys }}
    {{- include "foundry.gateway.keyVolume" $root | nindent 4 }}
    {{- end }}
    {{- if $root.Values.tls.enabled }}
    - name: tls
      secret:
        secretName: {{ include "foundry.tls.secretName" . }}
        items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}, {key: ca.crt, path: ca.crt}]
    {{- end }}
    {{- if and (eq .name "gateway") $values.https.existingSecret }}
    - name: https
      secret:
        secretName: {{ $values.https.existingSecret }}
        items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}]
    {{- end }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* Calls still arrive until the callers have heard of it: refused, they would cost a whole batch asked again, or an error
where there is no other replica. Takes the rollout's values. */}}
{{- define "foundry.drainCommand" -}}
sleep {{ .preStopSeconds }}; exec python -m foundry.rpc.probe --drain {{ ceil .settings.grace_seconds }}
{{- end -}}

{{/* What a pod is given to end: the wait before SIGTERM or a drain, the calls in flight, and ten seconds to close. Takes a
service's values. */}}
{{- define "foundry.terminationGracePeriodSeconds" -}}
{{ add (int .preStopSeconds) (int (ceil .settings.grace_seconds)) 10 }}
{{- end -}}

{{/* Resources and GPUs of whatever has them. Quantities are strings: before 1.21 the API server refuses numbers in what is
applied on its side. Takes values with resources and, maybe, gpu. */}}
{{- define "foundry.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if gt (int (dig "gpu" "count" 0 .)) 0 }}
{{- $_ := set $resources "limits" (merge (dict .gpu.resourceName .gpu.count) (default (dict) $resources.limits)) }}
{{- end }}
{{- range $kind := list "limits" "requests" }}
{{- range $name, $quantity := get $resources $kind | default (dict) }}
{{- $_ := set (get $resources $kind) $name (toString $quantity) }}
{{- end }}
{{- end }}
{{- toYaml $resources }}
{{- end -}}
