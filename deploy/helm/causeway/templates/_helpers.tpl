{{- /* Generated from k8s/install by go generate. Change it there. */ -}}
{{- define "causeway.initialCluster" -}}
{{- range $i := until (int .Values.etcd.members) }}{{ if $i }},{{ end }}causeway-etcd-{{ $i }}=causeway-etcd-{{ $i }}.causeway-etcd.{{ $.Release.Namespace }}.svc:7962{{ end -}}
{{- end -}}
{{- define "causeway.storeEndpoints" -}}
[{{- range $i := until (int .Values.etcd.members) }}{{ if $i }},{{ end }}"https://causeway-etcd-{{ $i }}.causeway-etcd.{{ $.Release.Namespace }}.svc:7961"{{ end -}}]
{{- end -}}
