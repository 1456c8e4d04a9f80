package install

import (
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// storeService gives members their names. It has no address: clients and members connect to the nodes' addresses, which need no network of pods.
func (v values) storeService() *corev1.Service {
	return &corev1.Service{
		ObjectMeta: v.meta(StoreName, storeComponent),
		Spec: corev1.ServiceSpec{
			ClusterIP: corev1.ClusterIPNone, Selector: selector(storeComponent), PublishNotReadyAddresses: true,
			Ports: []corev1.ServicePort{
				{Name: "client", Port: StoreClientPort, Protocol: corev1.ProtocolTCP},
				{Name: "peer", Port: StorePeerPort, Protocol: corev1.ProtocolTCP},
			},
		},
	}
}

// storeBudget lets one node at a time be drained.
func (v values) storeBudget() *policyv1.PodDisruptionBudget {
	one := intstr.FromInt32(1)
	return &policyv1.PodDisruptionBudget{
		ObjectMeta: v.meta(StoreName, storeComponent),
		Spec:       policyv1.PodDisruptionBudgetSpec{MaxUnavailable: &one, Selector: &metav1.LabelSelector{MatchLabels: selector(storeComponent)}},
	}
}

// store is the cluster's own etcd. Its pods are in their nodes' network, since pods have none before the agents, and agents want the store first; so they
// have ports of nodes, and no two of them are on one.
func (v values) store() *appsv1.StatefulSet {
	none, no := int64(0), false
	host := "$(POD_NAME)." + StoreName + "." + v.namespace + ".svc"
	var class *string
	if v.storageClass != "" {
		class = &v.storageClass
	}
	probe := func(path string) corev1.ProbeHandler {
		return corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Host: "127.0.0.1", Port: intstr.FromInt32(StoreHealthPort), Path: path}}
	}
	mode := int32(0o400)
	return &appsv1.StatefulSet{
		ObjectMeta: v.meta(StoreName, storeComponent),
		Spec: appsv1.StatefulSetSpec{
			Replicas: &v.members, ServiceName: StoreName, PodManagementPolicy: appsv1.ParallelPodManagement, // None is ready before most are.
			Selector:       &metav1.LabelSelector{MatchLabels: selector(storeComponent)},
			UpdateStrategy: appsv1.StatefulSetUpdateStrategy{Type: appsv1.RollingUpdateStatefulSetStrategyType},
			VolumeClaimTemplates: []corev1.PersistentVolumeClaim{{
				ObjectMeta: metav1.ObjectMeta{Name: "data", Labels: labels(storeComponent)},
				Spec: corev1.PersistentVolumeClaimSpec{
					AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, StorageClassName: class,
					Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(v.storageSize)}},
				},
			}},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels(storeComponent)},
				Spec: corev1.PodSpec{
					ServiceAccountName: StoreName, HostNetwork: true, DNSPolicy: corev1.DNSDefault, PriorityClassName: "system-cluster-critical",
					EnableServiceLinks: &no,
					// A node is not ready before it has a network, which takes agents, which take the store.
					Tolerations: []corev1.Toleration{
						{Key: corev1.TaintNodeNotReady, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoSchedule},
						{Key: corev1.TaintNodeNetworkUnavailable, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoSchedule},
						{Key: "node-role.kubernetes.io/control-plane", Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoSchedule},
					},
					Affinity: &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{{
						LabelSelector: &metav1.LabelSelector{MatchLabels: selector(storeComponent)}, TopologyKey: corev1.LabelHostname,
					}}}},
					Containers: []corev1.Container{{
						Name: "etcd", Image: v.image, Command: []string{Program},
						Args: []string{
							"kvstore", "--name=$(POD_NAME)", "--data-dir=" + storeDataDir + "/data", "--cluster=" + v.clusterName, "--pki=" + pkiDir,
							// The certificate is for the names and addresses here: members and this cluster's agents know the one, other clusters the other.
							"--listen-client=$(POD_IP):" + strconv.Itoa(StoreClientPort), "--advertise-client=" + host + ":" + strconv.Itoa(StoreClientPort),
							"--listen-peer=$(POD_IP):" + strconv.Itoa(StorePeerPort), "--listen-health=127.0.0.1:" + strconv.Itoa(StoreHealthPort),
							"--initial-cluster=" + v.initialCluster, "--initial-cluster-token=" + v.storeToken,
							"--resolve-pods-of=" + StoreName + "." + v.namespace,
						},
						Env: append(v.apiEnv(), fieldEnv("POD_NAME", "metadata.name"), fieldEnv("POD_IP", "status.podIP")),
						Ports: []corev1.ContainerPort{
							{Name: "client", ContainerPort: StoreClientPort, HostPort: StoreClientPort, Protocol: corev1.ProtocolTCP},
							{Name: "peer", ContainerPort: StorePeerPort, HostPort: StorePeerPort, Protocol: corev1.ProtocolTCP},
						},
						// A member that waits for the others is alive, and not ready: probes begin to count when it has had its time for that.
						StartupProbe:   &corev1.Probe{ProbeHandler: probe("/livez"), PeriodSeconds: 5, FailureThreshold: 120},
						LivenessProbe:  &corev1.Probe{ProbeHandler: probe("/livez"), PeriodSeconds: 10, FailureThreshold: 6, TimeoutSeconds: 5},
						ReadinessProbe: &corev1.Probe{ProbeHandler: probe("/readyz"), PeriodSeconds: 5, FailureThreshold: 3, TimeoutSeconds: 5},
						Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{
							corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("128Mi"),
						}},
						SecurityContext: &corev1.SecurityContext{
							AllowPrivilegeEscalation: &no, RunAsUser: &none,
							// A volume's root directory may be somebody else's.
							Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: []corev1.Capability{"DAC_OVERRIDE"}},
						},
						VolumeMounts: []corev1.VolumeMount{
							{Name: "data", MountPath: storeDataDir},
							{Name: "pki", MountPath: pkiDir},
							{Name: "authority", MountPath: pkiDir + "/ca.crt", SubPath: "ca.crt", ReadOnly: true},
							{Name: "authority", MountPath: pkiDir + "/ca.key", SubPath: "ca.key", ReadOnly: true},
						},
					}},
					Volumes: []corev1.Volume{
						// The certificate for the members' names and addresses is made at each start, and its key is on no disk.
						{Name: "pki", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory}}},
						{Name: "authority", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: AuthorityName, DefaultMode: &mode}}},
					},
				},
			},
		},
	}
}

// apiEnv says where the API server is without the Service "kubernetes", which a pod has otherwise in the same variables.
func (v values) apiEnv() []corev1.EnvVar {
	if v.apiHost == "" {
		return nil
	}
	return []corev1.EnvVar{{Name: "KUBERNETES_SERVICE_HOST", Value: v.apiHost}, {Name: "KUBERNETES_SERVICE_PORT", Value: v.apiPort}}
}

func fieldEnv(name, path string) corev1.EnvVar {
	return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}}
}
