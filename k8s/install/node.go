package install

import (
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// hostPaths are what an agent has of its node.
var hostPaths = []struct {
	name, path  string
	kind        corev1.HostPathType
	propagation corev1.MountPropagationMode // of mounts that come later; empty is none
	init        bool                        // only the init container has it
}{
	{name: "bpf", path: "/sys/fs/bpf", kind: corev1.HostPathDirectoryOrCreate, propagation: corev1.MountPropagationBidirectional}, // pins outlive the agent; it mounts bpffs where nobody has
	{name: "cgroup", path: "/sys/fs/cgroup", kind: corev1.HostPathDirectory, propagation: corev1.MountPropagationHostToContainer}, // whose processes get service translation; what outlives the agent
	{name: "run", path: "/run/causeway", kind: corev1.HostPathDirectoryOrCreate},                                                  // the socket, for the CNI plugin
	{name: "netns", path: "/run/netns", kind: corev1.HostPathDirectoryOrCreate, propagation: corev1.MountPropagationHostToContainer},
	{name: "state", path: stateDir, kind: corev1.HostPathDirectoryOrCreate},
	{name: "modules", path: "/lib/modules", kind: corev1.HostPathDirectoryOrCreate},
	{name: "cni-bin", path: hostBinDir, kind: corev1.HostPathDirectoryOrCreate, init: true},
	{name: "cni-conf", path: hostConfDir, kind: corev1.HostPathDirectoryOrCreate, init: true},
}

// agent runs on every node. It is privileged, and not only given NET_ADMIN, BPF, PERFMON, SYS_ADMIN and SYS_RESOURCE, for what these don't open: /dev/net/tun (WireGuard in user space,
// where the kernel has none), bpffs mounted for the node, and the node's cgroups, into which the L7 proxy and that WireGuard are put. Together with the node's
// process IDs that lets them outlive the agent's container: a pod that is replaced interrupts nothing.
func (v values) agent() *appsv1.DaemonSet {
	yes, no := true, false
	authorityMode := int32(0o400)
	unavailable := intstr.FromString("10%")
	grace := int64(10)
	volumes := []corev1.Volume{
		{Name: "config", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: AgentName}}}},
		{Name: "authority", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: AuthorityName, DefaultMode: &authorityMode}}},
	}
	mounts := []corev1.VolumeMount{{Name: "config", MountPath: configDir, ReadOnly: true}}
	initMounts := []corev1.VolumeMount{{Name: "authority", MountPath: authorityDir, ReadOnly: true}, {Name: "state", MountPath: stateDir}}
	for _, h := range hostPaths {
		kind := h.kind
		volumes = append(volumes, corev1.Volume{Name: h.name, VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: h.path, Type: &kind}}})
		mount := corev1.VolumeMount{Name: h.name, MountPath: h.path}
		if h.propagation != "" {
			propagation := h.propagation
			mount.MountPropagation = &propagation
		}
		if h.name == "modules" {
			mount.ReadOnly = true
		}
		if h.init {
			initMounts = append(initMounts, mount)
		} else {
			mounts = append(mounts, mount)
		}
	}
	alive := corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{Program, "node", "list", "--output=json"}}}
	return &appsv1.DaemonSet{
		ObjectMeta: v.meta(AgentName, agentComponent),
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: selector(agentComponent)},
			UpdateStrategy: appsv1.DaemonSetUpdateStrategy{
				Type: appsv1.RollingUpdateDaemonSetStrategyType, RollingUpdate: &appsv1.RollingUpdateDaemonSet{MaxUnavailable: &unavailable},
			},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{
					Labels: labels(agentComponent),
					// The first that "kubectl logs" and "exec" take.
					Annotations: map[string]string{"kubectl.kubernetes.io/default-container": AgentContainer},
				},
				Spec: corev1.PodSpec{
					ServiceAccountName: AgentName, HostNetwork: true, HostPID: true, DNSPolicy: corev1.DNSDefault, PriorityClassName: "system-node-critical",
					EnableServiceLinks: &no, TerminationGracePeriodSeconds: &grace,
					Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
					NodeSelector: map[string]string{
						corev1.LabelOSStable: "linux",
					},
					InitContainers: []corev1.Container{{
						Name: "prepare", Image: v.image, Command: []string{Program},
						Args: []string{
							"prepare-node", "--mode=" + v.mode, "--authority=" + authorityDir, "--pki=" + pkiDir, "--cni-bin-dir=" + hostBinDir, "--cni-conf-dir=" + hostConfDir,
						},
						VolumeMounts: initMounts,
					}},
					Containers: []corev1.Container{{
						Name: AgentContainer, Image: v.image, Command: []string{Program}, Args: []string{"agent", "--config=" + configDir + "/agent.yaml"},
						Env: append(v.apiEnv(), fieldEnv("NODE_NAME", "spec.nodeName")),
						// An agent that waits for the store, as at the first start of a cluster, is alive.
						StartupProbe:    &corev1.Probe{ProbeHandler: alive, PeriodSeconds: 5, TimeoutSeconds: 5, FailureThreshold: 240},
						LivenessProbe:   &corev1.Probe{ProbeHandler: alive, PeriodSeconds: 30, TimeoutSeconds: 10, FailureThreshold: 4},
						ReadinessProbe:  &corev1.Probe{ProbeHandler: alive, PeriodSeconds: 15, TimeoutSeconds: 10, FailureThreshold: 2},
						SecurityContext: &corev1.SecurityContext{Privileged: &yes},
						Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{
							corev1.ResourceCPU: resource.MustParse("50m"), corev1.ResourceMemory: resource.MustParse("128Mi"),
						}},
						VolumeMounts: mounts,
					}},
					Volumes: volumes,
				},
			},
		},
	}
}
